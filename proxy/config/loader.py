"""Settings from flags, environment, file and defaults, in this order of precedence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from . import environment
from .problems import COMMAND_LINE, DEFAULT, Invalid, Problem, SettingsError, SourceLocation
from .reading import Reading, read_section
from .schema import SETTINGS, with_fixed
from .settings import Settings
from .tree import Listing, Node, Scalar, Table, nested, parse
from .upstreams import READERS
from .urls import parse_url
from .validate import check, check_upstreams

AUTOMATIC: Final = "config.yaml"
FLAGS: Final[Mapping[str, str]] = {
    "server.host": "--host",
    "server.port": "--port",
    "server.workers": "--workers",
    "cache.backend": "--cache",
    "cache.mode": "--mode",
    "cache.cassette": "--cassette",
    "upstream": "--upstream",
    "log.level": "--log-level",
    "log.format": "--log-format",
}

_LARGEST_FILE: Final = 256 * 1024
_SECTIONS: Final = re.compile(rf"^(?:{'|'.join(SETTINGS.settings)})\s*:", re.MULTILINE)
_SUBSTITUTED: Final = re.compile(r"\$\{[^}]*\}")


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings that may be used. `sources`: dotted path -> where the value comes from. `watched`: key files and other
    files whose change counts. `sections`: those of the file that say anything.
    """

    settings: Settings
    file: Path | None = None
    warnings: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    watched: tuple[Path, ...] = ()
    sections: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Sources:
    """The arguments of `load`."""

    config: Path | None
    flags: Mapping[str, object]
    environ: Mapping[str, str]
    cwd: Path
    use_upstreams: bool
    in_force: LoadedSettings | None


def load(
    config: Path | None,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    cwd: Path,
    *,
    use_upstreams: bool = True,
    in_force: LoadedSettings | None = None,
) -> LoadedSettings:
    """Return the settings to be put in force. Raises SettingsError with every problem there is.

    Replay needs no key, so a CI without the secrets of `upstreams` can use the file that recorded: no key is read then.

    `config` None: `config.yaml` in `cwd`, if it is there and ours. `flags`: the paths of `FLAGS` -> values,
    None for a flag not given. `use_upstreams` False: no upstream and no upstream key is read from anywhere.
    `in_force`: what a running proxy has; the settings must also be usable with what it keeps of that (`with_fixed`).
    """
    sources = _Sources(config, flags, environ, cwd, use_upstreams, in_force)
    reading, loaded = _read(sources, with_keys=True)
    if use_upstreams and (in_force or loaded).settings.cache.mode == "replay":
        reading, loaded = _read(sources, with_keys=False)
    if reading.problems:
        raise SettingsError(_in_order(reading.problems, reading.file))
    return loaded


def _read(sources: _Sources, with_keys: bool) -> tuple[Reading, LoadedSettings]:
    """Return one reading and what came of it, which may be used if there are no problems."""
    environ, in_force, automatic = sources.environ, sources.in_force, sources.config is None
    file = sources.config or Path(AUTOMATIC)
    path = sources.cwd / file
    reading = Reading(
        environ=environ,
        folder=path.parent,
        cwd=sources.cwd,
        readers=READERS,
        file=str(file),
        defaults=environment.defaults(environ),
        automatic=automatic,
    )
    from_file = _file_layer(path, reading)
    sections = _sections(from_file)
    if in_force is not None and not reading.problems:
        _check_lost(in_force, sections, reading)
    flags = {path: _flag(path, value) for path, value in sources.flags.items() if value is not None}
    upstream_flag = flags.pop("upstream", None)
    layers = [from_file or Table((), SourceLocation(reading.file)), *environment.settings_layers(environ, reading)]
    layers += [nested(path.split("."), node) for path, node in flags.items()]
    rest = [layer.without("upstreams") if isinstance(layer, Table) else layer for layer in layers]
    listing: Node | None = None
    if sources.use_upstreams:
        listing = _upstreams(_highest(layers, "upstreams"), upstream_flag, environ, reading)
        if not with_keys:
            listing = _without_keys(listing)
        rest.append(Table((("upstreams", listing),), listing.where))
    settings: Settings = read_section(SETTINGS, rest, "", reading)
    check(settings, reading)
    if listing is not None:
        check_upstreams(settings, reading)
        if automatic:
            _check_automatic(settings, listing, reading)
    if in_force is not None and not reading.problems:
        _check_kept(in_force.settings, settings, reading)
    environment.warn_unread(environ, reading)
    places = {setting: where.label for setting, where in reading.places.items()}
    warnings, watched = tuple(reading.warnings), tuple(reading.watched)
    used = file if from_file is not None else None
    return reading, LoadedSettings(settings, used, warnings, places, watched, sections)


def _check_lost(in_force: LoadedSettings, sections: frozenset[str], reading: Reading) -> None:
    """Refuse a file that has lost its sections: it is being written, or was emptied by mistake."""
    where = SourceLocation(reading.file)
    if in_force.sections and not sections:
        reading.fail(where, "", "expected the sections that it had, found none of them")
    elif "upstreams" in in_force.sections - sections:
        reading.fail(where, "upstreams", "expected the section that it had, found none")


def _check_kept(in_force: Settings, settings: Settings, reading: Reading) -> None:
    """Check the rules over several values for what will be in force: the new settings beside those that stay."""
    merged, kept = with_fixed(in_force, settings)
    if merged.passthrough and not in_force.passthrough:
        reading.fail_at("upstreams", "expected a key, as before, found none; without keys it must be started anew")
    check(merged, reading)
    check_upstreams(merged, reading)
    stays = f" ({', '.join(kept)} can only change at a start)" if kept else ""
    for i, problem in enumerate(reading.problems):
        file = reading.file if problem.file == DEFAULT.file else problem.file
        reading.problems[i] = replace(problem, file=file, message=problem.message + stays)


def _sections(layer: Node | None) -> frozenset[str]:
    """Return the sections of a file that say anything."""
    entries = layer.entries if isinstance(layer, Table) else ()
    return frozenset(name for name, node in entries if not _is_empty(node) and node != Table((), node.where))


def _file_layer(path: Path, reading: Reading) -> Node | None:
    """Return the tree of the settings file; None if there is none that counts."""
    where = SourceLocation(reading.file)
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise Invalid(f"expected at most {_LARGEST_FILE // 1024} KiB of settings, found more")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        problem = "" if reading.automatic else "expected a settings file, found none"
    except OSError as error:
        problem = f"expected a readable file, found: {error.strerror}"
    except UnicodeDecodeError:
        problem = "expected UTF-8, found other bytes"
    except Invalid as error:
        problem = str(error)
    else:
        if not reading.automatic or _SECTIONS.search(text):
            return parse(text, where, reading.problems) or Scalar("", where)
        reading.warn(f"{AUTOMATIC} in this directory has no section of ours and is not read")
        return None
    if problem:
        reading.problems.append(where.problem("", problem))
    return None


def _flag(path: str, value: object) -> Scalar:
    return Scalar(str(value), SourceLocation(COMMAND_LINE, via=FLAGS[path]), literal=True)


def _highest(layers: list[Node], name: str) -> Node | None:
    """Return the value of the strongest layer that says anything about `name`."""
    for layer in reversed(layers):
        node = layer.get(name) if isinstance(layer, Table) else None
        if node is not None and not _is_empty(node):
            return node
    return None


def _is_empty(node: Node) -> bool:
    return (isinstance(node, Listing) and not node.items) or (isinstance(node, Scalar) and node.null)


def _without_keys(listing: Node) -> Node:
    if not isinstance(listing, Listing):
        return listing
    items = tuple(
        item.without("keys").without("entra_id") if isinstance(item, Table) else item for item in listing.items
    )
    return Listing(items, listing.where)


def _upstreams(written: Node | None, flag: Scalar | None, environ: Mapping[str, str], reading: Reading) -> Node:
    """Return the upstreams' tree: what is written, else the environment's. `--upstream` moves the only one."""
    if flag is None:
        return environment.upstreams(environ, reading) if written is None else written
    if written is None:
        return Listing((environment.upstream_at(flag.text, flag.where, environ),), flag.where)
    if not isinstance(written, Listing) or not isinstance(written.items[0], Table):
        return written
    if len(written.items) > 1:
        message = f"expected a single upstream for it to move, found {len(written.items)} in the settings"
        reading.fail(flag.where, "upstreams", message)
        return written
    return Listing((written.items[0].replaced("base_url", flag),), written.where)


def _check_automatic(settings: Settings, listing: Node, reading: Reading) -> None:
    """Refuse a `config.yaml` that nobody named if it sends keys from outside itself to a foreign host."""
    items = listing.items if isinstance(listing, Listing) else ()
    if len(items) != len(settings.upstreams):
        return  # some could not be read, which is reported
    for i, (item, upstream) in enumerate(zip(items, settings.upstreams, strict=True)):
        path = f"upstreams.{i}"
        place = reading.place(f"{path}.base_url")
        if item.where.file != AUTOMATIC or place.file == COMMAND_LINE or not isinstance(item, Table):
            continue
        host = parse_url(upstream.base_url).host if upstream.base_url else ""
        if host in ("", "api.openai.com") or host.endswith(".openai.azure.com"):
            continue
        if _takes_secrets(item, reading):
            message = f"a file that sends keys from elsewhere to {host} must be named with --config {AUTOMATIC}"
            reading.fail(place, f"{path}.base_url", message)


def _takes_secrets(upstream: Table, reading: Reading) -> bool:
    """Return whether an upstream as written takes anything from the environment, or a key from a file elsewhere."""
    base_url = upstream.get("base_url")
    if isinstance(base_url, Scalar) and "${" in base_url.text and not _SUBSTITUTED.fullmatch(base_url.text):
        return True
    return any(_takes_from_outside(node, name, reading) for name, node in upstream.entries if name != "base_url")


def _takes_from_outside(node: Node, name: str, reading: Reading) -> bool:
    if isinstance(node, Table):
        return any(_takes_from_outside(child, inner, reading) for inner, child in node.entries)
    if isinstance(node, Listing):
        return any(_takes_from_outside(child, name, reading) for child in node.items)
    if name == "key_file":
        file = reading.resolve(node.where, node.text).resolve()
        return not file.is_relative_to(reading.folder.resolve())
    return "${" in node.text


def _in_order(problems: list[Problem], file: str) -> tuple[Problem, ...]:
    """Return the file's problems by line, then the environment's, then the command line's."""
    return tuple(
        sorted(
            dict.fromkeys(problems),
            key=lambda problem: (problem.file != file, problem.file == COMMAND_LINE, problem.line or 0),
        )
    )
