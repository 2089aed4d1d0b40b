"""Arguments of a network besides its name, as `--model-kwargs` takes them: plain values alone."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lbaccel.errors import InputError, brief

SMALL_IMAGE = 64  # pixels a side: below, a network made for photographs needs another stem
MOST = 100  # arguments, and values in one of them
MOST_CHARACTERS = 1000  # of a value
MOST_NUMBER = 2**53
MOST_DEPTH = 4
ZERO_INIT_LAST = "zero_init_last"
_NAME = re.compile(r"[A-Za-z_]\w{0,63}")
_EXPONENT = re.compile(r"[+-]?\d+[eE][+-]?\d+")  # a number to Python, text to YAML
# arguments that lbaccel sets itself: the sentence that says how
_BY_FLAG = {
    "num_classes": "--num-classes",
    "img_size": "--img-size",
    "drop_rate": "--drop-rate",
    "drop_path_rate": "--drop-path",
    "drop_path": "--drop-path",
    "pretrained": "--pretrained",
    "checkpoint_path": "--checkpoint",
    "bn_momentum": "--bn-momentum",
    "model_name": "--model",
}
_OTHERS = {"in_chans": "channels follow the data"} | dict.fromkeys(
    (
        *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
        *("pretrained_model_args", "cache_dir", "scriptable", "exportable", "no_jit", "pruned"),
        *("features_only", "feature_cfg", "feature_cls", "out_indices", "model_cls", "variant"),
        *("model_cfg", "cfg", "kwargs_filter", "device", "dtype"),
    ),
    "it is none of the network's own",
)


def network_arguments(raw: Any, *, where: str = "--model-kwargs") -> dict[str, Any] | None:
    """The arguments in words such as `stem=8`, or in a mapping; None for none.

    A value is a Python literal, read by `ast.literal_eval`, which executes nothing; other text is
    text. Lists are tuples, so that a saved run has the arguments that it began with.

    Args:
        raw: words of a command line, or a mapping of YAML or JSON.
        where: the flag, or the key and its file, for errors.

    Raises:
        InputError: no argument, one that another flag sets, or a value that is not plain.

    >>> network_arguments(["stem=8", "widths=(8,16,32)", "zero_init_last=False", "act=gelu"])
    {'stem': 8, 'widths': (8, 16, 32), 'zero_init_last': False, 'act': 'gelu'}
    >>> network_arguments({"widths": [8, 16, 32]})
    {'widths': (8, 16, 32)}
    """
    if isinstance(raw, str):
        raw = [raw]
    if not isinstance(raw, (Mapping, Sequence)):
        raise InputError(f"{where}={brief(raw)} is no mapping. Write key=value, as stem=8.")
    if not raw or list(raw) == ["none"]:
        return None
    pairs = raw.items() if isinstance(raw, Mapping) else [_pair(word, where) for word in raw]
    if len(pairs) > MOST:
        raise InputError(f"{where} has {len(pairs)} arguments; at most {MOST} are read.")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(f"{where}: {brief(name)} is no name of an argument, such as stem.")
        if name in found:
            raise InputError(f"{where} gives {name} twice. Leave one of them out.")
        _check_free(name, where)
        found[name] = _plain(value, f"{where} {name}", depth=0)
    return found


def as_words(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments as words that are typed.

    >>> as_words({"stem": 8, "widths": (8, 16, 32), "act": "gelu", "tag": "8"})
    ['stem=8', 'widths=(8,16,32)', 'act=gelu', "tag='8'"]
    """
    return [f"{name}={_typed(value)}" for name, value in arguments.items()]


def _typed(value: Any) -> str:
    if isinstance(value, str):
        return value if value and _literal(value) == value else repr(value)
    if isinstance(value, (list, tuple)):
        return f"({','.join(map(_inner, value))}{',' * (len(value) == 1)})"
    return _inner(value)


def _inner(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return _typed(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k!r}:{_inner(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _pair(word: Any, where: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=") if isinstance(word, str) else ("", "", "")
    if not equals:
        raise InputError(
            f"{where}: {brief(word)} is no key=value. Type arguments of the network, such as "
            "stem=8 'widths=(8,16,32)'; flags come before it."
        )
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{where} {name} has {len(text):,} characters; {MOST_CHARACTERS} is most.")
    return name.lstrip("-").replace("-", "_"), _literal(text)


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, on text that is no Python
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _check_free(name: str, where: str) -> None:
    flag = _BY_FLAG.get(name)
    if flag is not None:
        raise InputError(f"{where} {name}: lbaccel sets it itself. Use {flag} in its place.")
    if name in _OTHERS:
        raise InputError(f"{where} {name}: {_OTHERS[name]}. Leave it out.")


def _plain(value: Any, where: str, *, depth: int) -> Any:
    """The value with tuples for lists.

    Raises:
        InputError: it is another kind, or too large.
    """
    if value is None:
        raise InputError(f"{where}=None asks for nothing: timm leaves it out, and so do you.")
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or abs(value) > MOST_NUMBER:
            raise InputError(f"{where}={brief(value)} is no number from -2^53 to 2^53.")
        return value
    if isinstance(value, str):
        if len(value) > MOST_CHARACTERS:
            raise InputError(f"{where} has {len(value):,} characters; {MOST_CHARACTERS} is most.")
        return float(value) if _EXPONENT.fullmatch(value) else value
    if isinstance(value, (list, tuple, Mapping)):
        if len(value) > MOST or depth >= MOST_DEPTH:
            raise InputError(
                f"{where}={brief(value)} is too large: at most {MOST} values, {MOST_DEPTH} deep."
            )
        if isinstance(value, Mapping):
            return {str(k): _plain(v, where, depth=depth + 1) for k, v in value.items()}
        return tuple(_plain(item, where, depth=depth + 1) for item in value)
    raise InputError(
        f"{where}={brief(value)} is no number, text, truth value, or list or mapping of them."
    )
