"""vLLM's words about adapters that are loaded and unloaded while it serves."""

from __future__ import annotations

from .adapters import Adapters
from .vllm_error import VllmError, not_found
from .vllm_fields import Body, flag, text


class VllmAdapters:
    """The two routes about adapters, as with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.

    Args:
        adapters: Those of the engine.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def load(self, body: Body) -> str:
        """Take an adapter; a name that is there must be given with ``load_inplace``."""
        name, path = text(body, "lora_name"), text(body, "lora_path")
        if not name or not path:
            raise _invalid("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self._adapters and not flag(body, "load_inplace"):
            raise _invalid(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
        try:
            self._adapters.load(name, path)
        except FileNotFoundError as exc:
            raise not_found(f"Loading lora {name} failed: {exc}") from exc
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: Body) -> str:
        """Forget an adapter."""
        name = text(body, "lora_name")
        if not name:
            raise _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
        if name not in self._adapters:
            raise not_found(f"The lora adapter '{name}' cannot be found.")
        self._adapters.unload(name)
        return f"Success: LoRA adapter '{name}' removed successfully."


def _invalid(message: str) -> VllmError:
    return VllmError(message, kind="InvalidUserInput")
