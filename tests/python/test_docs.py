"""The documentation: what is made from sources is whole, and what people read is short."""

import importlib.util
import re
from pathlib import Path

import flexq
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_function_of_the_c_api_is_on_its_page():
    header = (ROOT / "include/flexq/flexq.h").read_text()
    page = _load("tools/docs/c_header.py").page(header)
    functions = re.findall(r"FLEXQ_API [^;(]*?(flexq_\w+)\(", header)
    assert len(functions) > 20
    assert [name for name in functions if f"{name}(" not in page] == []


def test_a_function_without_a_comment_is_refused():
    c_header = _load("tools/docs/c_header.py")
    with pytest.raises(ValueError, match="flexq_bare"):
        c_header.page("/* A header. */\n\n/* What it does. */\nFLEXQ_API int flexq_fine(void);\n\n"
                      "FLEXQ_API int flexq_bare(int a);\n")  # fmt: skip


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/reference/python.md").read_text()
    named = set(re.findall(r"^::: flexq\.[\w.]*?(\w+)$|^        - (\w+)$", page, re.MULTILINE))
    assert set(flexq.__all__) <= {a or b for a, b in named}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paragraphs_are_short(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] |\s*\d+\. |\||#)", text):
        if not paragraph.strip().startswith("|"):
            assert len(paragraph.split()) <= 80, paragraph


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_figures_are_drawn_from_the_tables(tmp_path, monkeypatch):
    """What docs/results/plot.py draws is what is committed."""
    plot = _load("docs/results/plot.py")
    for name in ("HERE", "KERNELS"):
        folder = getattr(plot, name)
        copy = tmp_path / name
        copy.mkdir()
        if (folder / "data").is_dir():
            (copy / "data").symlink_to(folder / "data")
        monkeypatch.setattr(plot, name, copy)
    plot.main()
    drawn = {path.name: path for path in tmp_path.glob("*/*.svg")}
    committed = {path.name: path for path in (ROOT / "docs").rglob("*.svg")}
    assert len(drawn) >= 7 and set(drawn) <= set(committed)
    assert [name for name in drawn if drawn[name].read_bytes() != committed[name].read_bytes()] == []


def test_the_table_of_devices_is_whole():
    page = (ROOT / "docs/reference/devices.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "cpp/cpu").glob("*.cpp"))
    instruction_sets = re.findall(r'\bkernels\w*\s*(?:=\s*)?\{\s*"([a-z][\w-]+)"', sources)
    assert len(instruction_sets) >= 5
    built = re.findall(r"\b(\d{2,3})a?-real", (ROOT / "cmake/FlexqCuda.cmake").read_text())
    built += re.findall(r"newer in ([\d ]+);", (ROOT / "tools/wheel.sh").read_text())[0].split()
    capabilities = [f"{a[:-1]}.{a[-1]}" for a in built]
    assert len(capabilities) >= 6
    assert [name for name in [*instruction_sets, *capabilities] if name not in page] == []


YAML = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


@pytest.mark.parametrize("file", YAML, ids=lambda p: p.name)
def test_what_services_read_is_yaml(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)
