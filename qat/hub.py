"""The Hugging Face hub: one short probe, then a download, the local cache, a stand-in that was asked for, or an error.

The hub client retries for half a minute without a network, and resumes a breaking transfer for as long as a byte
arrives. So one request (the listing of the repository, needed anyway) goes through the client's own session, where
proxies, certificates and HF_ENDPOINT count, without retries; and one file is asked for `TRIES` times at most.
"""

import glob
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCard, HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import get_session, httpx

from qat.errors import UserError

Kind = Literal["model", "dataset"]
WAIT = 2.5  # seconds for the probe: with what comes before it, a run without a hub ends within 5 s
TRIES = 4  # requests for one file in one download
FORGET = 60.0  # seconds for which an answer is remembered: the hub is asked before the slow imports, used after them
ON_DISK = {"model": "model.path=FOLDER", "data": "data=custom data.path=FILE"}
_down: dict[str, tuple[float, str]] = {}  # by endpoint, so that model and data do not both wait
_known: dict[tuple[str, str, str], tuple[float, Any]] = {}  # what `away` learned, for the `fetch` that follows it


class Unreachable(Exception):
    """The hub gave no answer and the cache does not hold the repository; the message is the reason."""


@dataclass(frozen=True)
class Fallback:
    """What was asked for, what stands in for it, and why: recorded in the report and told to the user."""

    requested: str
    used: str
    reason: str


def is_id(path: str) -> bool:
    """Whether `path` has the form of a hub id, `name` or `owner/name` (which says nothing about its existence)."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path, re.ASCII) is not None


def stand_in(requested: str, *, offline: str, explicit: bool, reason: str, key: str) -> Fallback:
    """The stand-in that `key`.offline names; UserError with the reason and the remedies where that is "error".

    `explicit` (the user gave the path himself) never falls back: what was asked for by name is not swapped.
    """
    if offline != "error" and not explicit:
        return Fallback(requested, offline, reason)
    raise unreachable({requested: key}, reason)


def unreachable(lost: dict[str, str], reason: str) -> UserError:
    """The refusal of a run that lacks these repositories (id -> "model" or "data"), with what would work."""
    on_disk = " ".join(ON_DISK[key] for key in dict.fromkeys(lost.values()))
    return UserError(
        f"{' and '.join(lost)} {'are' if len(lost) > 1 else 'is'} not in the local cache and the hub "
        f"({constants.ENDPOINT}) cannot be reached: {reason}. "
        f"`python train.py recipe=quickstart` needs no network at all; or name what is on disk: {on_disk}"
    )


def check_offline(offline: str, known: Iterable[str], key: str) -> None:
    """Raise UserError unless `offline` is "error" or the name of a known stand-in."""
    if offline not in (names := ["error", *known]):
        raise UserError(f"{key}.offline={offline} is not possible; choose {', '.join(names[:-1])} or {names[-1]}")


Choose = Callable[[list[str], dict[str, Any]], list[str]]


def fetch(repo: str, kind: Kind, key: str, choose: Choose) -> tuple[Path, list[str]]:
    """A local folder, and the files in it that `choose(names of all files, the card's metadata)` picks from `repo`.

    Without a network a cached snapshot counts if it has them all. Raises Unreachable (no answer, nothing cached) and
    UserError (unknown or gated repository, a download that breaks off, and whatever `choose` raises).
    """
    try:
        wanted = _choice(probe(repo, kind, key), choose)
    except Unreachable:
        if (held := cached(repo, kind, choose)) is not None:
            return held
        raise
    patterns = ["README.md", *(glob.escape(name) for name in wanted)]
    try:
        with _bounded():
            return Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns)), wanted
    except (httpx.HTTPError, XetDownloadError, EntryNotFoundError, OSError, RuntimeError) as e:
        if isinstance(e, HfHubHTTPError) and (refused := _refusal(e, repo, kind, key)):
            raise refused from e
        raise UserError(
            f"the download of {repo} from {constants.ENDPOINT} broke off: {first_line(e)}. "
            "Nothing half-written is used; run the same command again"
        ) from e


def away(repo: str, kind: Kind, key: str, choose: Choose) -> str | None:
    """Why `fetch` would raise Unreachable, None if it would not. Downloads nothing; raises its other UserErrors."""
    try:
        info = probe(repo, kind, key)
    except Unreachable as e:
        return None if cached(repo, kind, choose) else str(e)
    _choice(info, choose)
    _known[constants.ENDPOINT, repo, kind] = (time.monotonic(), info)
    return None


def _choice(info: Any, choose: Choose) -> list[str]:
    card = info.card_data.to_dict() if info.card_data else {}
    return choose([sibling.rfilename for sibling in info.siblings or []], card)


def cached(repo: str, kind: Kind, choose: Choose) -> tuple[Path, list[str]] | None:
    """What `fetch` returns, from the cache alone; None unless all of it is there. No network."""
    try:
        # The pattern matches what need not exist: any snapshot is returned, complete or not.
        folder = Path(snapshot_download(repo, repo_type=kind, local_files_only=True, allow_patterns="README.md/"))
    except EntryNotFoundError:
        return None
    try:
        names = [file.path for file in get_cached_repo_tree(repo, repo_type=kind)]
    except (CachedRepoTreeNotFoundError, EntryNotFoundError):  # files that another program fetched one by one
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    readme = folder / "README.md"
    card = DatasetCard(readme.read_text(encoding="utf-8")).data.to_dict() if readme.is_file() else {}
    try:
        wanted = choose(names, card)
    except UserError:
        return None
    whole = all((folder / name).is_file() for name in wanted) and not _lacks_shards(wanted)
    return (folder, wanted) if whole else None


def _lacks_shards(names: list[str]) -> bool:
    """Whether of name-00001-of-00003.suffix and its like there are fewer than three."""
    shards = Counter((m[1], m[2]) for name in names if (m := re.fullmatch(r"(.*)-\d+-of-(\d+)[^/]*", name)))
    return any(count < int(of) for (_, of), count in shards.items())


def probe(repo: str, kind: Kind, key: str) -> Any:
    """The hub's ModelInfo or DatasetInfo of `repo`, asked for once and for at most WAIT seconds.

    Raises Unreachable if no hub answers, UserError if it answers that the repository is unknown or closed.
    """
    since, reason = _down.get(constants.ENDPOINT, (-FORGET, ""))
    if time.monotonic() - since < FORGET:
        raise Unreachable(reason)
    since, info = _known.pop((constants.ENDPOINT, repo, kind), (-FORGET, None))
    if time.monotonic() - since < FORGET:
        return info
    try:
        return _ask(repo, kind, key)
    except Unreachable as e:
        _down[constants.ENDPOINT] = (time.monotonic(), str(e))
        raise


def _ask(repo: str, kind: Kind, key: str) -> Any:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(HfApi().repo_info(repo, repo_type=kind, timeout=WAIT))
        except Exception as e:  # raised again by the caller
            answers.put(e)

    # A thread, because the socket's timeout covers neither the look-up of the name nor a second address.
    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=WAIT)
        if isinstance(answer, Exception):
            raise answer
        return answer
    except (queue.Empty, httpx.TimeoutException) as e:
        raise Unreachable(f"no answer within {WAIT:g} s") from e
    except OfflineModeIsEnabled as e:
        raise Unreachable("HF_HUB_OFFLINE is set") from e
    except HfHubHTTPError as e:
        answer = f"{e.response.status_code} {e.response.reason_phrase}"
        raise _refusal(e, repo, kind, key) or Unreachable(f"the answer was {answer}") from e
    except (httpx.HTTPError, OSError) as e:
        raise Unreachable(first_line(e)) from e
    except (ValueError, TypeError) as e:
        raise Unreachable("what answered there is not a hub (a login page or a proxy?)") from e


def _refusal(error: HfHubHTTPError, repo: str, kind: Kind, key: str) -> UserError | None:
    """What the user must hear if a hub did answer; None for its own troubles (429, 5xx) and for proxies.

    A hub signs its refusals (X-Error-Code or X-Error-Message); a firewall's bare 403 or 404 means no hub at all.
    """
    status, headers = error.response.status_code, error.response.headers
    signed = "X-Error-Code" in headers or "X-Error-Message" in headers
    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, GatedRepoError):
        return UserError(f"{repo} is gated: accept its terms at {place}, run `hf auth login`, then run this again")
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and signed):
        return UserError(
            f"{key}={repo}: no such folder here, and no such {kind} at {constants.ENDPOINT} "
            "(if it is private, run `hf auth login` first)"
        )
    if status == 401 or (status == 403 and signed):
        return UserError(f"{place} refused access ({status}): run `hf auth login` with a token that may read it")
    return None


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a download whose server breaks every transfer: the client alone would resume for ever."""
    asked: Counter[str] = Counter()

    def count(request: Any) -> None:
        asked[f"{request.method} {request.url}"] += 1
        if asked[f"{request.method} {request.url}"] > TRIES:
            raise ConnectionError(f"the transfer of {request.url.path.rsplit('/', 1)[-1]} stopped {TRIES} times")

    hooks = get_session().event_hooks["request"]
    hooks.append(count)
    try:
        yield
    finally:
        if count in hooks:
            hooks.remove(count)


def first_line(error: Exception) -> str:
    """The first line of an exception's text without its full stop, for use inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
