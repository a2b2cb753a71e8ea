"""mergekit's YAML as one of our plans: models, parameters for each or for all, gradients and filters of weights, dtypes.

What cannot be said exactly in a plan of ours is refused with the reason, never approximated in silence. The arithmetic is always fp32
(mergekit's `dtype` decides what it is there, and is taken as the dtype to write).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from guidetune.errors import BadInput

Options = dict[str, Any]
KNOWN = {
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
}
PER_MODEL = {"weight", "density", "gamma", "epsilon"}
RENAMED = {"della_linear": "della", "dare_linear": "dare", "dare_ties": "dare", "breadcrumbs_ties": "breadcrumbs", "nuslerp": "slerp"}


def is_mergekit(tree: Any) -> bool:
    return isinstance(tree, Mapping) and ("merge_method" in tree or "slices" in tree)


def _elect(o: Options) -> Options:
    return {"sign": "elect", "agg": "mean" if o.get("normalize", False) else "sum"}


def _rescale(o: Options) -> Options:
    return {"rescale": "l1" if o.get("rescale", True) else "none"}


def _band(o: Options) -> Options:
    return {"keep": o.get("density", 1.0), "drop_top": o.get("gamma", 0.01), "scope": "tensor", "order": "fit"}


# mergekit's method -> our options, besides `scale` (its lambda)
METHODS: dict[str, Callable[[Options], Options]] = {
    "linear": lambda o: {"method": "linear"} if o.get("normalize", True) else {"method": "sum"},
    "task_arithmetic": lambda o: {"normalize": bool(o.get("normalize", False))},
    "ties": lambda o: {
        "density": o.get("density", 1.0), "scope": "tensor", "tie": "plus", "agg": "mean" if o.get("normalize", True) else "sum",
    },
    "dare_linear": lambda o: {"density": o.get("density", 1.0), **_rescale(o)},
    "dare_ties": lambda o: {"density": o.get("density", 1.0), **_rescale(o), **_elect(o)},
    "breadcrumbs": _band,
    "breadcrumbs_ties": lambda o: {**_band(o), **_elect(o)},
    "model_stock": lambda o: {"clamp": False},
    "sce": lambda o: {"select_topk": o.get("select_topk", 1.0)},
    "slerp": lambda o: {},
    "nuslerp": lambda o: {"of": "updates", "linear_above": 1.0},
    "karcher": lambda o: {},
}  # fmt: skip
SCALED = {"task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "sce"}
OPTIONS = {
    "linear": {"normalize"}, "task_arithmetic": {"normalize", "lambda"}, "ties": {"normalize", "lambda", "density"},
    "dare_linear": {"density", "rescale", "lambda"}, "dare_ties": {"density", "rescale", "normalize", "lambda"},
    "breadcrumbs": {"density", "gamma", "lambda"}, "breadcrumbs_ties": {"density", "gamma", "normalize", "lambda"},
    "model_stock": set(), "sce": {"select_topk", "lambda"}, "slerp": {"t"}, "nuslerp": set(), "karcher": set(),
}  # fmt: skip


def plan_of(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tree of a plan of ours with the same meaning.

    Raises:
        BadInput: with every part that has no equal here.
    """
    problems: list[str] = []
    kind = tree.get("merge_method")
    if "slices" in tree:
        problems.append("slices are not supported; list whole models")
    if not isinstance(kind, str) or kind not in METHODS:
        problems.append(f"merge_method {kind!r} has no equal here; there are {', '.join(METHODS)}")
    problems += [f"{key} is not supported" for key in tree if key not in KNOWN | {"slices"}]
    tokenizer = tree.get("tokenizer") or {}
    if not isinstance(tokenizer, Mapping):
        problems.append("tokenizer must be a mapping with source")
        tokenizer = {}
    problems += [f"tokenizer.{key} is not supported" for key in tokenizer if key != "source"]
    source = tokenizer.get("source", "union") if tokenizer else tree.get("tokenizer_source")
    if source not in (None, "base", "union"):
        problems.append(f"tokenizer source {source!r} is not supported: base or union")
    if tree.get("chat_template") not in (None, "auto"):
        problems.append("chat_template is not supported: the base model's is kept")
    models = tree.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(m, Mapping) and isinstance(m.get("model"), str) for m in models):
        problems.append("models must be a list of {model: ..., parameters: {...}}")
    if problems:
        raise BadInput([f"{name}: {problem}" for problem in problems])
    assert isinstance(models, list) and isinstance(kind, str)
    shared = dict(tree.get("parameters") or {})
    base = tree.get("base_model")
    each = [{**shared, **(m.get("parameters") or {})} for m in models]
    names = [m["model"] for m in models]
    if base in names and kind not in ("slerp", "linear", "karcher"):  # listed without effect, as mergekit's examples do
        keep = [i for i, model in enumerate(names) if model != base]
        names, each = [names[i] for i in keep], [each[i] for i in keep]
    unknown = {key for options in each for key in options} - OPTIONS[kind] - PER_MODEL - {"int8_mask"}
    problems += [f"parameter {key} of {kind} has no equal here" for key in sorted(unknown)]
    options: Options = {}
    for key in sorted({key for one in each for key in one if key in OPTIONS[kind]}):
        values = [one.get(key) for one in each]
        if any(value != values[0] for value in values):
            problems.append(f"{key} differs between models, which is one option here")
        elif isinstance(values[0], list) and key != "t":
            problems.append(f"{key} as a list is not supported; only weights may follow the layers")
        options[key] = values[0]
    weights: list[Any] = [one.get("weight", 1.0) for one in each]
    if kind == "slerp":
        t = options.get("t", 0.5)
        if len(names) != 2 or base not in (None, *names):
            problems.append("slerp takes two models, one of them the base_model")
        elif base == names[1]:
            names.reverse()
        weights = [_less(t), t]
    if problems:
        raise BadInput([f"{name}: {problem}" for problem in problems])
    method = {"method": RENAMED.get(kind, kind), **METHODS[kind](options)}
    if kind in SCALED:
        method["scale"] = options.get("lambda", 1.0)
    anchor = base if base is not None else names[0]
    sources = [{"model": model, "weight": weight} for model, weight in zip(names, weights, strict=True)]
    written = {"anchor": anchor, "sources": sources, "method": method, "out_dtype": tree.get("out_dtype") or tree.get("dtype") or "auto"}
    return written if source is None else {**written, "tokenizer": source}


def _less(t: Any) -> Any:
    """1 − t, of a number, a gradient or filters."""
    if isinstance(t, list):
        return [{**one, "value": _less(one["value"])} if isinstance(one, Mapping) and "value" in one else _less(one) for one in t]
    return 1 - t if isinstance(t, (int, float)) else t
