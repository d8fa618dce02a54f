"""A plan's part in the key of vLLM's compile cache."""

import hashlib
from typing import Any

from vllm.config import get_current_vllm_config_or_none


def have_vllm_tell_plans_apart(of_plan: str) -> None:
    """Puts a plan's hash into the key of vLLM's compile cache, whose graphs have layers' settings as constants, and
    which knows a quantization by its name alone. May be called more than once."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return
    given = vllm_config.additional_config
    if isinstance(given, dict):
        vllm_config.additional_config = {**given, "flexq_plan": of_plan}
    else:
        vllm_config.additional_config = _WithPlan(given._given if isinstance(given, _WithPlan) else given, of_plan)


class _WithPlan:
    """Another's additional configuration, whose hash the plan is in too."""

    def __init__(self, given: Any, of_plan: str):
        self._given, self._of_plan = given, of_plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._given, name)

    def compute_hash(self) -> str:
        return hashlib.sha256((self._given.compute_hash() + self._of_plan).encode()).hexdigest()
