"""Before the seconds of heavy imports: whether the model and the data that a run names are there, or can be had.

What it imports itself is light (no torch, Lightning or transformers), so that a run without a network ends at once.
"""

from collections.abc import Callable
from typing import Any

from qat import hub
from qat.data import published
from qat.models import load


def refuse_missing(config: dict[str, Any]) -> None:
    """Raise UserError for a path that is neither on disk nor on the hub, or that no run could use.

    Where the hub is out of reach, one message names all that neither the cache holds nor a stand-in replaces.
    """
    lost: dict[str, str] = {}
    reason = ""
    for part, known in (("model", load.EMBEDDED), ("data", [published.STAND_IN])):
        node = config[part]
        look = LOOK.get(str(node["_target_"]))
        if look is None:
            continue
        offline = node.get("offline", "error")
        hub.check_offline(offline, known, part)
        replaced = offline != "error" and not node.get("explicit", True)
        for key in ("path", "validation_path"):
            path = node.get(key)
            if not path or not isinstance(path, str):  # `settings.check` names what is not text
                continue
            why = look(path, f"{part}.{key}", node)
            if why and not replaced:
                lost[path], reason = part, why
    if lost:
        raise hub.unreachable(lost, reason)


def _model(path: str, key: str, node: dict[str, Any]) -> str | None:
    folder = load.local(path)
    if folder is None:
        return load.away(path, bool(node.get("trust_remote_code")))
    load.refuse_folder(folder, str(folder))
    return None


def _data(path: str, key: str, node: dict[str, Any]) -> str | None:
    return published.away(path, node.get("config"), key) if published.local(path, key) is None else None


LOOK: dict[str, Callable[[str, str, dict[str, Any]], str | None]] = {
    "qat.models.load.Pretrained": _model,
    "qat.data.custom.CustomData": _data,
    "qat.data.wikitext2.WikiText2": _data,
}
