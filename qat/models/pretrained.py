"""`model=` for weights that exist: a hub id, a Hugging Face folder, or the embedded model; loaded when the run asks."""

from typing import Any

from qat.models.load import Loaded, load


class Pretrained:
    """Arguments of `qat.models.load.load`, kept until `load`; `explicit` is set for a path the user gave."""

    def __init__(
        self,
        *,
        name: str,
        path: str | None,
        dtype: str = "float32",
        device_map: Any = None,
        offline: str = "error",
        trust_remote_code: bool = False,
        explicit: bool = False,
    ) -> None:
        self.path = path
        self.options = {"name": name, "dtype": dtype, "device_map": device_map, "offline": offline}
        self.options |= {"trust_remote_code": trust_remote_code, "explicit": explicit}

    def load(self, data: Any) -> Loaded:
        """The float model, its tokenizer and where they came from; `data` is not needed. Raises UserError."""
        return load(self.path, **self.options)
