"""Writing folders: nothing is lost, whoever writes, kills or stands in the way; the same input, the same bytes."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import flexq
import pytest
from conftest import character_tokenizer
from flexq.checkpoint import folder
from flexq.checkpoint.folder import new_folder


@pytest.fixture
def checkpoint(tiny_llama, tmp_path):
    return flexq.save_model(flexq.quantize_model(tiny_llama), tmp_path / "checkpoint")


def write(path: Path, text: str = "new", **options) -> None:
    with new_folder(path, **options) as aside:
        (aside / "config.json").write_text(text)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_what_appears_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError, match="the new folder was left at"), new_folder(tmp_path / "out") as aside:
        (aside / "config.json").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "yours").write_text("yours")
    assert (tmp_path / "out" / "yours").read_text() == "yours"
    assert (tmp_path / "out-1" / "config.json").read_text() == "mine"
    assert names(tmp_path) == ["out", "out-1"]


def test_of_two_writers_neither_loses(tmp_path):
    with pytest.raises(FileExistsError, match="was left at"), new_folder(tmp_path / "out") as first:
        (first / "config.json").write_text("first")
        write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "config.json").read_text() == "second"
    assert (tmp_path / "out-1" / "config.json").read_text() == "first"


@pytest.mark.parametrize("exchange", (True, False))
def test_replaces_checkpoints_alone(checkpoint, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    write(checkpoint, overwrite=True)
    assert names(checkpoint) == ["config.json"] and names(tmp_path) == ["checkpoint"]
    with pytest.raises(FileExistsError, match="is not a FlexQ checkpoint; choose another output"):
        write(checkpoint, overwrite=True)  # what was just written is none
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(FileExistsError, match="is not a FlexQ checkpoint"):
        write(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_a_checkpoint_with_a_folder_of_its_own_is_not_replaced(checkpoint):
    (checkpoint / ".git").mkdir()
    with pytest.raises(FileExistsError, match=r"it holds a folder of its own, \.git"):
        write(checkpoint, overwrite=True)


@pytest.mark.parametrize("exchange", (True, False))
def test_an_error_or_interrupt_keeps_the_old_one(checkpoint, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(checkpoint, overwrite=True) as aside:
            (aside / "half").write_text("half")
            raise error
    rename = Path.rename

    def fails(self, target):
        if Path(target) == checkpoint and "old" not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    if not exchange:
        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(KeyboardInterrupt):
            write(checkpoint, overwrite=True)
        monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    assert names(tmp_path) == ["checkpoint"]


def test_never_in_the_way_of_the_source(tiny_folder, tmp_path):
    for output in (tiny_folder, tiny_folder / "inside", tmp_path, tiny_folder / ".." / "float"):
        with pytest.raises(FileExistsError, match="is, holds or lies in the source"):
            flexq.quantize_checkpoint(tiny_folder, output, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(tiny_folder)
    with pytest.raises(FileExistsError, match="is, holds or lies in the source"):
        flexq.quantize_checkpoint(tiny_folder, link, overwrite=True)


def test_an_empty_folder_keeps_its_place(tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    flexq.quantize_checkpoint(tiny_folder, out)
    assert out.stat().st_ino == inode and flexq.load_model(out) is not None
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    flexq.quantize_checkpoint(tiny_folder, ".")
    assert flexq.load_model(".") is not None and names(here) == names(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tiny_folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")


def test_where_nothing_can_be_made_is_known_before_the_work(tiny_folder, monkeypatch):
    monkeypatch.setattr("flexq.checkpoint.convert.skeleton", lambda *_: pytest.fail("work was done"))
    with pytest.raises(OSError, match="/proc"):
        flexq.quantize_checkpoint(tiny_folder, "/proc/flexq/out")


def test_a_link_to_a_checkpoint_stays_one(tiny_folder, checkpoint, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    flexq.quantize_checkpoint(tiny_folder, link, "w6a6", overwrite=True)
    assert link.is_symlink() and flexq.load_model(checkpoint).flexq_plan.defaults.act_bits == 6
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_full_disk_is_one_line_and_leaves_the_old_one(tiny_folder, checkpoint, tmp_path, monkeypatch):
    from flexq.checkpoint import write as writer
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writer, "save_file", full)
    before = names(checkpoint)
    with pytest.raises(OSError, match="No space left on device"):
        flexq.quantize_checkpoint(tiny_folder, checkpoint, overwrite=True)
    assert names(checkpoint) == before and names(tmp_path) == ["checkpoint", "float"]


def kill_at(tmp_path: Path, code: str) -> None:
    """Run code that prints a line and waits; kill it there."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()


WAIT = "print('waiting', flush=True); time.sleep(60)"


def test_leftovers_of_killed_runs_are_named_and_cleaned(tmp_path, capfd):
    code = f"import time\nfrom flexq.checkpoint.folder import new_folder\nwith new_folder('out') as a:\n  {WAIT}\n"
    kill_at(tmp_path, code)
    (left,) = tmp_path.glob(".out.flexq-new-*")
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert f"removing {left}, which an interrupted run left" in capfd.readouterr().err


def test_a_run_that_works_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as first:
        with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
            raise RuntimeError
        assert first.is_dir()
        (first / "config.json").write_text("x")
    assert names(tmp_path) == ["out"]


def test_an_old_checkpoint_whose_place_is_empty_comes_back(checkpoint, tmp_path, capfd):
    code = (
        "import time\nfrom pathlib import Path\nfrom flexq.checkpoint import folder\n"
        "folder._exchange = lambda one, other: False\nrename = Path.rename\n"
        f"def wait(self, target):\n  if 'old' not in self.name and Path(target).name == 'checkpoint':\n    {WAIT}\n"
        "  return rename(self, target)\nPath.rename = wait\n"
        "with folder.new_folder('checkpoint', overwrite=True) as aside:\n  (aside / 'config.json').write_text('x')\n"
    )
    content = names(checkpoint)
    kill_at(tmp_path, code)
    assert not checkpoint.exists()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        write(checkpoint)
    assert names(checkpoint) == content and names(tmp_path) == ["checkpoint"]
    assert "is restored from" in capfd.readouterr().err


def test_killed_at_any_moment(tiny_folder, tmp_path):
    """Whenever it is killed, the old checkpoint or the new one is there, whole."""
    out = tmp_path / "out"
    flexq.quantize_checkpoint(tiny_folder, out, "w6a8")
    code = (
        "import sys, threading, os, time, flexq\nprint('ready', flush=True)\n"
        "def kill(): time.sleep(float(sys.argv[3])); os.kill(os.getpid(), 9)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "while True: flexq.quantize_checkpoint(sys.argv[1], sys.argv[2], 'w6a6', overwrite=True)\n"
    )
    for delay in (0.05, 0.13, 0.21, 0.34):
        subprocess.run([sys.executable, "-c", code, str(tiny_folder), str(out), str(delay)], capture_output=True)
        assert flexq.checkpoint.verify.verify(out).tensors > 0


def test_same_input_same_bytes(tiny_folder, tmp_path):
    character_tokenizer().save_pretrained(tiny_folder)
    code = "import sys, flexq; flexq.quantize_checkpoint(sys.argv[1], sys.argv[2], shard_bytes=60000)"
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", code, str(tiny_folder), str(tmp_path / name)], check=True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) > 5


def test_modes_and_companions(tiny_folder, tmp_path):
    character_tokenizer().save_pretrained(tiny_folder)
    (tiny_folder / "additional_chat_templates").mkdir()
    (tiny_folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    for name in ("chat_template.jinja", "preprocessor_config.json", "merges.txt", "README.md"):
        (tiny_folder / name).write_text("x")
    (tiny_folder / "modeling_own.py").write_text("raise SystemExit")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tiny_folder / "link.json").symlink_to(secret)
    before = os.umask(0o027)
    try:
        flexq.quantize_checkpoint(tiny_folder, tmp_path / "out")
    finally:
        os.umask(before)
    out = tmp_path / "out"
    kept = {"chat_template.jinja", "preprocessor_config.json", "merges.txt", "README.md", "tokenizer.json"}
    assert kept | {"generation_config.json", "additional_chat_templates"} <= set(names(out))
    assert (out / "additional_chat_templates" / "rag.jinja").is_file()
    assert not {"link.json", "modeling_own.py"} & set(names(out))
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir() if p.is_file()} == {0o640}


def test_links_as_the_hubs_cache_lays_them(tiny_folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for index, file in enumerate(tiny_folder.iterdir()):
        shutil.copy(file, repository / "blobs" / str(index))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(index))
    flexq.quantize_checkpoint(snapshot, tmp_path / "out")
    shard = next(snapshot.glob("*.safetensors"))
    elsewhere = shutil.copy(shard, tmp_path / "elsewhere.safetensors")
    shard.unlink()
    shard.symlink_to(elsewhere)
    with pytest.raises(flexq.ModelError, match="is a link out of the folder"):
        flexq.quantize_checkpoint(snapshot, tmp_path / "other")
