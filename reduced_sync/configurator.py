"""Config files that are exec'd and --key=value arguments, as in nanoGPT, but checked.

    script.py config/a.py config/b.py --batch_size=8 --device=cpu

The defaults are a dataclass whose fields are made with `option`. Files are executed in order, each seeing the defaults
and what earlier files have set as builtins; then come the arguments, which win wherever they stand. The value of a text
key is the argument as it is typed, without quotes of Python's; where a key may be None, the text None is that. Other
values are Python literals. A name with a leading underscore, a module, a function or a class in a config file is the
file's own; every other name must be a key, and its value must have the key's type.

A command without config files has the same arguments (`parse`), and lists: keys of a type tuple[KIND, ...].
"""

import argparse
import ast
import builtins
import dataclasses
import os
import reprlib
import sys
import types
import typing
from pathlib import Path
from typing import Any

from reduced_sync.cli import one_line
from reduced_sync.old_keys import OLD, translate_old_keys


def option(
    default: Any,
    meaning: str,
    least: float | None = None,
    below: float = 2**63,
    allowed: tuple | None = None,
    is_path: bool = False,
) -> Any:
    """A field of a config dataclass: its default, a line for --help, and what a value other than None must be.

    A number with `least` is at least that and less than `below`; with `allowed` a value is one of those. Where
    `is_path`, a ~ at its start is the home folder.
    """
    metadata = {"meaning": meaning, "least": least, "below": below, "allowed": allowed, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


def configure(cls: type, argv: list[str], manual: str = "") -> Any:
    """The config of dataclass `cls` that the arguments `argv` ask for. Raises ValueError with one clear line.

    Of a command with a `manual`, --help prints that with all keys, and ends the process. The config's attribute `given`
    is the set of keys that a file or an argument wrote, be it their default's value.
    """
    if manual and {"--help", "-h"} & set(argv):
        print(manual, "Keys, as lines of a config file (key = value) or as arguments:\n", describe(cls), sep="\n")
        sys.exit()
    defaults, values = {field.name: field.default for field in dataclasses.fields(cls)}, {}
    for path in argv:
        if not path.startswith("--"):
            values |= _run_file(cls, path, defaults | values)
    for argument in argv:
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            if not equals:
                raise ValueError(f"{argument}: arguments are CONFIG.py or --key=value (--help lists the keys)")
            values[key] = _typed(cls, key, _value(text, _kinds(cls, key)), argument)
    return _config(cls, values)


def parse(cls: type, argv: list[str], listed: str, description: str, program: str | None = None) -> Any:
    """The config of dataclass `cls` that the arguments `argv` of a command without config files ask for.

    --key=value, or --key value; a list is --key=1,2 or --key 1 2, and a switch may be --key alone. Arguments without a
    key are those of the key `listed`. Raises ValueError with one clear line; argparse ends the process for --help and
    for keys that there are not.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=form, allow_abbrev=False)
    fields = dataclasses.fields(cls)
    for field in fields:
        default, allowed = field.default, field.metadata["allowed"]
        text = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = field.metadata["meaning"] + (f" (default: {text})" if default not in (None, (), False) else "")
        keys = {"help": text.replace("%", "%%"), "metavar": allowed and f"{{{','.join(allowed)}}}"}
        if field.name == listed:
            parser.add_argument(field.name, nargs="*", **keys)
        else:
            parser.add_argument(f"--{field.name}", nargs="+" if isinstance(default, tuple) else None, **keys)
    switches = {f"--{field.name}" for field in fields if bool in _kinds(cls, field.name)}
    texts_of = vars(parser.parse_args([f"{text}=True" if text in switches else text for text in argv]))

    def typed(key, text):
        return _typed(cls, key, _value(text, _kinds(cls, key)), text if key == listed else f"--{key}={text}")

    values = {}
    for key, given in texts_of.items():
        if isinstance(given, str):
            values[key] = typed(key, given)
        elif given:
            texts = given if key == listed else [text for one in given for text in one.split(",")]
            values[key] = tuple(typed(key, text) for text in texts)
    return _config(cls, values)


def _config(cls, values):
    """The dataclass of these written values, of the right types. Raises ValueError for one out of its bounds."""
    if old := [key for key in OLD if key in values]:
        keys = {key: values[key] for key in [*old, "n_layer"] if key in values}
        try:
            sync = translate_old_keys(keys).get("sync", "baseline")
        except (TypeError, AttributeError):  # a value of the wrong type
            sync = "spd"
        raise ValueError(f"{', '.join(old)}: this is one key now, such as {sync=}")
    for field in dataclasses.fields(cls):
        if field.metadata["is_path"] and values.get(field.name) is not None:
            values[field.name] = os.path.expanduser(values[field.name])
    config = cls(**values)
    config.given = set(values)
    for field in dataclasses.fields(config):
        least, below, allowed = (field.metadata[bound] for bound in ("least", "below", "allowed"))
        value = getattr(config, field.name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if allowed is not None and one not in allowed:
                raise ValueError(f"{field.name}={one!r}: allowed are {', '.join(map(str, allowed))}")
            if least is not None and not least <= one < below:
                limit = "2^63" if below == 2**63 else below
                raise ValueError(f"{field.name}={one} must be at least {least}, and below {limit}")
    return config


def describe(cls: type) -> str:
    """A line per key of `cls`: name, default, meaning, and the values that are allowed where they are few."""
    lines = []
    for field in dataclasses.fields(cls):
        allowed = field.metadata["allowed"]
        choices = f": {', '.join(allowed)}" if allowed else ""
        default = str(field.default).replace("\n", r"\n")
        lines.append(f"  --{field.name}={default:<12} {field.metadata['meaning']}{choices}")
    return "\n".join(lines)


def _run_file(cls, path, values):
    """{key: value} of what the config file at `path` writes, which sees `values`."""
    source = next((p for p in (Path(path), Path(__file__).parents[1] / path) if os.path.isfile(p)), None)
    if source is None:
        raise ValueError(f"no config file {path!r} (arguments are CONFIG.py or --key=value)")
    # as builtins, so that what is in the namespace afterwards is what the file wrote
    namespace = {"__file__": str(source.resolve()), "__builtins__": vars(builtins) | values}
    try:
        exec(compile(source.read_text(encoding="utf-8-sig"), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        raise ValueError(f"config file {path}: {type(error).__name__}: {one_line(error)}") from None
    result = {}
    for key, value in namespace.items():
        own = key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)
        if key in values or not own:
            result[key] = _typed(cls, key, value, f"config file {path}: {key}={reprlib.repr(value)}")
    return result


def _kinds(cls, key):
    """The types that `key`, or an element of that list, may have; none for an unknown key."""
    wanted = next((field.type for field in dataclasses.fields(cls) if field.name == key), None)
    if typing.get_origin(wanted) is tuple:
        wanted = wanted.__args__[0]
    return wanted.__args__ if isinstance(wanted, types.UnionType) else (wanted,) if wanted else ()


def _value(text, kinds):
    """What the text of an argument stands for, for a key of these types."""
    if str in kinds:
        return None if text == "None" and types.NoneType in kinds else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # no literal: of the wrong type


def _typed(cls, key, value, where):
    kinds = _kinds(cls, key)
    if not kinds and key in OLD and _kinds(cls, "sync"):
        return value  # refused with all of them
    if not kinds:
        names = ", ".join(field.name for field in dataclasses.fields(cls))
        raise ValueError(f"{where}: unknown key {key!r}; known are {names}")
    if float in kinds and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            pass
    if type(value) not in kinds:
        wanted = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: {key} must be {wanted}, not {type(value).__name__}")
    return value
