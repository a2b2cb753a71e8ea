"""A finished run folder as the pipeline leaves it, with made-up but consistent numbers: every score follows from its items."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guidetune.evaluation.statistics import paired, wilson

SKILLS = [
    "copy",
    "reverse",
    "sort letters",
    "count letters",
    "uppercase",
    "last word",
    "add two numbers",
    "compare numbers",
    "capital of organ",
    "drug to disease",
    "yes or no",
    "JSON format",
]
# arm -> (probability right on the task at difficulty 2, 3, 4; probability right on a general skill)
ABILITY = {
    "instruct": ((0.72, 0.42, 0.2), 0.95),
    "sft": ((0.7, 0.5, 0.34), 0.5),
    "graft": ((0.6, 0.4, 0.25), 0.72),
    "gift": ((0.84, 0.58, 0.37), 0.93),
}
OWN = {
    "instruct": {"tune": None},
    "sft": {"tune": {"on": "instruct", "weights": []}},
    "graft": {"tune": {"weights": []}},
    "gift": {"tune": {"on": "base"}},
}


def _split(items: list[dict[str, Any]], key: str) -> dict[str, Any]:
    groups: dict[str, list[int]] = {}
    for item in items:
        if key in item["meta"]:
            groups.setdefault(str(item["meta"][key]), []).append(item["correct"])
    return {name: {"score": sum(values) / len(values), "n": len(values)} for name, values in groups.items()}


def _draw(rng: random.Random, item: str) -> float:
    """Uniform in [0, 1): mostly the item's own difficulty, which all arms share, sometimes the arm's luck."""
    return rng.random() if rng.random() < 0.25 else random.Random(f"hard {item}").random()


def _task_items(rng: random.Random, arm: str, n: int, label: str) -> list[dict[str, Any]]:
    items = []
    for i in range(n):
        level = i % 3
        truth = random.Random(f"{label}{i}")
        apples, pears, fewer = truth.randint(5, 60), truth.randint(5, 60), truth.randint(1, 9)
        answer = apples + pears - fewer
        right = int(_draw(rng, f"{label}{i}") < ABILITY.get(arm, ABILITY["gift"])[0][level])
        said = answer if right else answer + rng.choice([-10, -2, 1, 3, 10])
        prompt = (
            f"Ana has {apples} apples and buys {pears} pears. She gives away {fewer} of them and then counts what is left. "
            "How many pieces of fruit does she have?"
        )
        steps = [f"Ana starts with {apples} apples.", f"{apples} + {pears} = {apples + pears}", f"{apples + pears} - {fewer} = {said}"]
        output = "\n".join([*steps, f"The answer is {said}."])
        items.append(
            {
                "id": f"{label}-{i:04d}",
                "prompt": prompt,
                "output": output,
                "reference": str(answer),
                "correct": right,
                "meta": {"difficulty": level + 2, "category": "arithmetic"},
            }
        )
    return items


def _general_items(rng: random.Random, arm: str, n: int) -> list[dict[str, Any]]:
    items = []
    for i in range(n):
        skill = SKILLS[i % len(SKILLS)]
        ability = ABILITY.get(arm, ABILITY["gift"])[1]
        right = int(_draw(rng, f"skills{i}") < min(1.0, ability + 0.04 * (i % len(SKILLS) - 6) * (1 - ability) * 2))
        word = random.Random(i).choice(["garden", "window", "harbour", "thistle", "lantern"])
        items.append(
            {
                "id": f"skills-{i:04d}",
                "prompt": f"Do this with the word {word!r}: {skill}.",
                "output": word[::-1] if right else f"The answer is {word}.",
                "reference": word[::-1],
                "correct": right,
                "meta": {"skill": skill},
            }
        )
    return items


def build_run(
    folder: Path,
    arms: tuple[str, ...] = ("instruct", "sft", "graft", "gift"),
    n: int = 300,
    tasks: tuple[str, ...] = ("word_problems",),
    change: Callable[[dict[str, Any]], None] | None = None,
    rewrite: Callable[[dict[str, Any]], None] | None = None,
    kind: str = "compare",
) -> Path:
    """Write a run folder; `change` edits the results before they are written, `rewrite` every evaluation item."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "name": "word-problems-gift",
        "kind": kind,
        "created": "2026-11-20T09:14:00+00:00",
        "seconds": 1312.4,
        "recipe": {
            "name": "word-problems-gift",
            "models": {"base": "world:base", "instruct": "world:instruct"},
            "data": {
                "train": [{"path": "problems/train.jsonl", "map": {"user": "question", "assistant": "solution"}}, {"path": "extra.jsonl"}],
                "over_length": "cut",
                "max_length": 512,
            },
            "tune": {
                "on": "base",
                "params": {"method": "lora", "rank": 16, "alpha": 32},
                "weights": [{"method": "gift", "power": 1.0}],
                "reducer": "weights",
                "lr": 4e-4,
                "epochs": 3,
                "batch": 32,
                "seed": 42,
            },
            "transfer": {"into": "instruct", "scale": 1.0, "rounding": "nearest"},
            "evaluate": {"task": ["word_problems"], "general": ["skills"], "temperature": 0.0},
            "seed": 42,
        },
        "models": {
            "base": "world:base",
            "instruct": "world:instruct",
            "pair": {"relative_distance": 0.0713, "architecture": "LlamaForCausalLM", "same_tokenizer": True},
        },
        "arms": {},
        "guidance": {
            "teacher": "instruct",
            "mean_confidence": 0.7134,
            "supervised_tokens": 181_240,
            "below_0.05": 0.0831,
            "histogram": {
                "edges": [i / 20 for i in range(21)],
                "counts": [
                    15061,
                    5200,
                    3900,
                    3300,
                    3100,
                    2900,
                    2800,
                    2850,
                    2900,
                    3050,
                    3300,
                    3600,
                    4100,
                    4700,
                    5500,
                    6600,
                    8300,
                    11400,
                    20200,
                    68479,
                ],
            },
        },
        "ledger": {
            "read": 4000,
            "used": 3921,
            "cut": 34,
            "dropped": {"longer than max_length": 41, "empty answer": 25, "duplicate": 13},
            "tokens": 402_118,
            "supervised_tokens": 181_240,
            "sources": {
                "problems/train.jsonl": {
                    "read": 3500,
                    "used": 3440,
                    "cut": 34,
                    "dropped": {"longer than max_length": 41, "empty answer": 6, "duplicate": 13},
                },
                "extra.jsonl": {"read": 500, "used": 481, "cut": 0, "dropped": {"empty answer": 19}},
            },
            "lengths": {"p50": 98, "p95": 171, "max": 512},
            "ends_with_stop": 3887,
            "examples": {
                "empty answer": [{"id": "extra-17", "line": 18, "why": "assistant message has no text"}],
                "duplicate": [{"id": "p-204", "line": 205, "why": "same messages as p-12"}],
            },
        },
        "versions": {"guidetune": "0.1.0", "torch": "2.13.0", "transformers": "5.3.0", "peft": "0.18.0", "python": "3.11.7"},
        "machine": {"cpu": "x86-64, 2 cores", "cores": 2, "memory_gb": 24.0},
    }
    bins = [(0.0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0)]
    tokens = [20261, 12300, 17700, 27300, 25200, 78479]
    signals = {
        "sft": [0.58, 0.16, 0.1, 0.08, 0.05, 0.03],
        "graft": [0.6, 0.17, 0.09, 0.07, 0.05, 0.02],
        "gift": [0.07, 0.14, 0.19, 0.21, 0.17, 0.22],
    }
    reference: dict[str, list[int]] = {}
    for name in arms:
        rng = random.Random(name)
        arm: dict[str, Any] = {
            "status": "ok",
            "error": None,
            "description": {
                "instruct": "the instruct model as it is",
                "sft": "LoRA on the instruct model",
                "graft": "LoRA on base, moved to instruct",
                "gift": "guided LoRA on base, moved to instruct",
            }.get(name, ""),
            "recipe": OWN.get(name, {}),
            "task": {},
            "general": {},
            "cost": {"evaluate_s": 61.2},
            "paths": {},
        }
        top = folder if kind == "run" and name != "instruct" else folder / "arms" / name
        groups = {"task": {label: _task_items(rng, name, n, label) for label in tasks}, "general": {"skills": _general_items(rng, name, n)}}
        for group, by_label in groups.items():
            for label, items in by_label.items():
                path = top / "evaluation" / group / f"{label}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                right = [item["correct"] for item in items]
                score = sum(right) / len(right)
                by = {key: part for key in ("skill", "difficulty", "category") if (part := _split(items, key))}
                result = {
                    "score": score,
                    "ci": list(wilson(sum(right), len(right))),
                    "n": len(right),
                    "metric": "accuracy",
                    "metrics": {"accuracy": score},
                    "by": by,
                    "items": str(path.relative_to(folder)),
                }
                if name == "instruct":
                    reference[label] = right
                elif label in reference:
                    result["vs_instruct"] = paired(right, reference[label])
                arm[group][label] = result
                if rewrite:
                    for item in items:
                        rewrite(item)
                path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
            arm[f"{group}_mean"] = sum(part["score"] for part in arm[group].values()) / len(arm[group])
        if name != "instruct":
            metrics = top / "metrics.jsonl"
            lines, start = [], 2.1 if name == "gift" else 2.9
            for step in range(1, 369):
                loss = 0.42 + (start - 0.42) * math.exp(-step / 70) + rng.gauss(0, 0.05)
                lines.append(
                    {
                        "step": step,
                        "epoch": step / 123,
                        "loss": loss,
                        "lr": 4e-4 * (1 - step / 369),
                        "grad_norm": 0.8,
                        "tokens": step * 1480,
                        "tokens_per_s": 5100.0,
                        "seconds": step * 0.29,
                    }
                )
                if step % 41 == 0:
                    lines.append(
                        {
                            "step": step,
                            "validation_loss": 0.61 + 1.9 * math.exp(-step / 60) + rng.gauss(0, 0.01) + (0.06 if name == "sft" else 0),
                        }
                    )
            metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            arm["paths"] = {
                "metrics": str(metrics.relative_to(folder)),
                "evaluation": str((top / "evaluation").relative_to(folder)),
                "adapter": "adapter",
                "model": "model",
            }
            arm["cost"] |= {
                "guide_s": 18.9 if name == "gift" else None,
                "tune_s": 107.3,
                "transfer_s": 2.4,
                "tokens": 543_720,
                "steps": 368,
                "peak_rss_mb": 1384.0,
            }
            arm["tune"] = {"loss_first": start, "loss_last": 0.44, "steps": 368}
            arm["transfer"] = {
                "tensors_changed": 56,
                "tensors_copied": 12,
                "delta_norm": 3.8412,
                "scale": 1.0,
                "rounding": "nearest",
                "dtype": "float32",
                "unchanged_share": 0.0,
                "verify": {"rows": 8, "max_logit_error": 2.4e-6},
            }
            if name in signals:
                arm["signal"] = [
                    {"lo": lo, "hi": hi, "tokens": count, "signal": share}
                    for (lo, hi), count, share in zip(bins, tokens, signals[name], strict=True)
                ]
        results["arms"][name] = arm
    if change:
        change(results)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def every_field(results: dict[str, Any]) -> None:
    """Add what only some runs have: the stored comparison, seeds, a scale sweep, curves over samples, the budget."""
    arms = {name: arm for name, arm in results["arms"].items() if name != "instruct"}
    rng = random.Random("every field")
    groups: dict[str, Any] = {"task": {}, "general": {}}
    pairs: list[dict[str, Any]] = []
    for name, arm in arms.items():
        for group in groups:
            for label, result in arm[group].items():
                test = result["vs_instruct"]
                test |= {"p_adjusted": min(1.0, test["p"] * len(arms)), "mde": 0.061, "verdict": f"{name} on {label} in words."}
                for other in list(arms)[: list(arms).index(name)]:
                    pairs.append(
                        {"a": other, "b": name, "group": group, "task": label, **test, "verdict": f"{other} and {name} on {label}."}
                    )
            first = next(iter(arm[group].values()))["vs_instruct"]
            groups[group][name] = {key: first[key] for key in ("diff", "ci", "p", "p_adjusted", "mde")}
            groups[group][name]["verdict"] = f"Stored sentence on {name} and {group}."
        arm["seeds"] = []
        for seed in range(1, 5):
            again = {
                "seed": 42 + seed,
                "status": "ok",
                **{
                    group: {
                        label: {
                            **{key: result[key] for key in ("score", "n")},
                            "vs_instruct": result["vs_instruct"] | {"diff": result["vs_instruct"]["diff"] + rng.gauss(0, 0.02)},
                        }
                        for label, result in arm[group].items()
                    }
                    for group in groups
                },
            }
            arm["seeds"].append(again)
        over = {}
        for group in groups:
            over[group] = {
                label: {"mean": result["score"], "sd": 0.012, "scores": [result["score"]] * 5, "vs_instruct": result["vs_instruct"]}
                for label, result in arm[group].items()
            }
            over[f"{group}_mean"] = {"mean": arm[f"{group}_mean"], "sd": 0.01, "scores": [arm[f"{group}_mean"]] * 5}
        arm["over_seeds"] = {"n": 5, **over}
    for arm in results["arms"].values():
        for result in arm["task"].values():
            p = result["score"]
            result["curves"] = {
                "k": [1, 2, 4, 8],
                "avg": [p] * 4,
                "pass": [1 - (1 - p) ** k for k in (1, 2, 4, 8)],
                "maj": [p, p, min(1, p * 1.1), min(1, p * 1.15)],
            }
    for name, arm in results["arms"].items():
        for result in arm["task"].values():
            result["notes"] = ["Refusals are found by a list of phrases."] + (["Two programs were stopped."] if name == "gift" else [])
    results["comparison"] = {
        "correction": "holm",
        "alpha": 0.05,
        "groups": groups,
        "pairs": pairs,
        "verdict": ["Only gift is shown to be better on the whole.", "Stored sentence on gift and task."],
    }
    results["scales"] = {
        name: {
            "chosen": 0.75,
            "chosen_on": "validation",
            "criterion": "most task gain with at most 0.02 lost on general skills",
            "points": [
                {
                    "scale": scale,
                    "validation": {"task": 0.4 + 0.2 * scale - 0.1 * scale**2, "general": 0.95 - 0.12 * scale**2},
                    "test": {
                        "task": {"word_problems": {"score": 0.41 + 0.18 * scale - 0.1 * scale**2, "ci": [0.3, 0.6], "n": 300}},
                        "general": {"skills": {"score": 0.94 - 0.13 * scale**2, "ci": [0.8, 0.99], "n": 300}},
                    },
                }
                for scale in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
            ],
            "verdict": [f"{name} at scale 0.75 in words."],
        }
        for name in list(arms)[:2]
    }
    results["budget"] = {name: {"supervised_tokens": 543_720, "rows": 11_763, "steps": 368} for name in arms}
    results["budget_equal"] = True


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """build_run in a fresh folder."""
    return lambda **options: build_run(tmp_path / "run", **options)
