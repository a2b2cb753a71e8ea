"""The model card: README.md of a merged model folder, in the form the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guidetune.report import numbers
from guidetune.report.findings import REFERENCE, arms_of, compare_group, failed, group_mean, mapping, tasks_of, verdicts
from guidetune.report.tables import markdown, markdown_text
from guidetune.report.text import clean

PAPER = "2605.01256"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _spec(value: Any) -> str:
    """A model's name as the user gave it."""
    if isinstance(value, Mapping):
        value = value.get("spec") or value.get("path")
    return clean(str(value)) if value else ""


def _hub_id(spec: str) -> bool:
    return bool(_HUB_ID.fullmatch(spec)) and not Path(spec).exists()


def _method_names(value: Any) -> list[str]:
    entries = value if isinstance(value, (list, tuple)) else [value]
    names = [entry.get("method") if isinstance(entry, Mapping) else entry for entry in entries]
    return [clean(str(name)) for name in names if name]


def settings_of(results: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """The recipe's sections as this arm used them: the arm's own recipe laid over the shared one.

    In a comparison that did not record the arm's own recipe, what arms differ in is left out: the shared recipe may say something else.
    """
    recipe = mapping(results.get("recipe"))
    own = mapping(mapping(mapping(results.get("arms")).get(arm)).get("recipe"))
    if not own:
        for key, value in mapping(mapping(recipe.get("arms")).get(arm)).items():  # as in a recipe: nested, or "tune.lr"
            section, _, option = str(key).partition(".")
            own[section] = {**mapping(own.get(section)), option: value} if option else value
    if not own and results.get("kind") == "compare":
        tune = {key: value for key, value in mapping(recipe.get("tune")).items() if key not in ("on", "weights", "params", "reducer")}
        recipe = {**recipe, "tune": tune, "transfer": {}}

    def laid(under: Any, over: Any) -> Any:
        if isinstance(under, Mapping) and isinstance(over, Mapping):
            return {**under, **{key: laid(under.get(key), value) for key, value in over.items()}}
        return over

    return laid({key: value for key, value in recipe.items() if key != "arms"}, own)


def front_matter(results: Mapping[str, Any], arm: str) -> str:
    """The YAML block: library_name, pipeline_tag, tags and base_model.

    The Hub refuses a `base_model` that is not a Hub id, so a local folder is left out and named in a comment instead.
    """
    import yaml

    models = mapping(results.get("models"))
    instruct = _spec(models.get("instruct"))
    settings = settings_of(results, arm)
    tune = mapping(settings.get("tune"))
    tags = [
        "guidetune",
        "fine-tuned",
        *_method_names(mapping(tune.get("params")) or tune.get("params")),
        *_method_names(tune.get("weights")),
    ]
    block: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    tags = [tag for tag in dict.fromkeys(re.sub(r"[^\w.:-]+", "-", tag.lower()).strip("-") for tag in tags) if tag]
    block["tags"] = [*tags, f"arxiv:{PAPER}"]
    comment = ""
    if _hub_id(instruct):
        block |= {"base_model": instruct, "base_model_relation": "finetune"}
    else:
        comment = f"# base_model: left out, {' '.join((instruct or 'the instruct model').split())} is not a Hub id\n"
    return f"---\n{yaml.safe_dump(block, sort_keys=False, allow_unicode=True)}{comment}---\n"


def _facts(pairs: Mapping[str, Any]) -> str:
    return "".join(
        f"- {name}: {markdown_text(numbers.any_value(value))}\n" for name, value in pairs.items() if value not in (None, "", [], {})
    )


def _how(results: Mapping[str, Any], arm: str) -> str:
    models = mapping(results.get("models"))
    base, instruct = (
        markdown_text(_spec(models.get("base")) or "not recorded"),
        markdown_text(_spec(models.get("instruct")) or "not recorded"),
    )
    settings = settings_of(results, arm)
    tune, into = mapping(settings.get("tune")), mapping(settings.get("transfer"))
    on, weights = tune.get("on"), _method_names(tune.get("weights"))
    weighted = (
        f"each target token's loss weighted by {', '.join(markdown_text(name) for name in weights)}"
        if weights
        else "every target token weighted alike"
    )
    if not on:
        lead = "Which model was tuned, and with which token weights, is not recorded in the results."
    elif on == "base":
        lead = (
            f"An adapter was trained on the base model with {weighted}, and its change of the weights was then added to the instruct model."
        )
    else:
        lead = f"An adapter was trained on the {markdown_text(str(on))} model itself with {weighted}, and merged into it."
    params = tune.get("params")
    shown = {
        "base": base,
        "instruct": instruct,
        "trained on": on,
        "trained part": _flat(params),
        "token weights": _flat(tune.get("weights")),
        **{
            key.replace("_", " "): _flat(tune.get(key))
            for key in ("reducer", "lr", "schedule", "warmup", "epochs", "batch", "max_length", "seed")
        },
        **{f"transfer {key}": _flat(value) for key, value in into.items()},
    }
    return f"{lead}\n\n{_facts(shown)}"


def _flat(value: Any) -> Any:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{key} {_flat(part)}" for key, part in value.items() if key != "method" and part is not None)
        name = str(value.get("method", ""))
        return f"{name} ({rest})" if name and rest else name or rest
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_flat(part)) for part in value)
    return value


def _data(results: Mapping[str, Any]) -> str:
    ledger = mapping(results.get("ledger"))
    if not ledger:
        return "The results hold no data ledger.\n"
    keys = ("read", *(("made",) if numbers.finite(ledger.get("made")) else ()), "used", "cut")
    head = ["source", *(key.replace("cut", "of these shortened") for key in keys), "dropped"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(keys) + 1)}"]
    for name, part in [*mapping(ledger.get("sources")).items(), ("**all**", ledger)]:
        dropped = sum(int(numbers.finite(n) or 0) for n in mapping(mapping(part).get("dropped")).values())
        shown = name if name == "**all**" else markdown_text(str(name))
        lines.append(f"| {shown} | {' | '.join(numbers.count(mapping(part).get(key)) for key in keys)} | {dropped:,} |")
    reasons = "; ".join(f"{markdown_text(str(reason))}: {numbers.count(n)}" for reason, n in mapping(ledger.get("dropped")).items())
    tail = f"\nDropped because: {reasons}.\n" if reasons else ""
    guidance = mapping(results.get("guidance"))
    if numbers.finite(guidance.get("mean_confidence")) is not None:
        teacher, tokens = markdown_text(str(guidance.get("teacher") or REFERENCE)), numbers.count(guidance.get("supervised_tokens"))
        mean, below = numbers.score(guidance.get("mean_confidence")), numbers.percent(guidance.get("below_0.05"))
        tail += f"\nThe teacher ({teacher}) gave the {tokens} target tokens a mean probability of {mean}; {below} of them lie below 0.05.\n"
    return "\n".join(lines) + "\n" + tail


def _limits(results: Mapping[str, Any], arm: str, arm_results: Mapping[str, Any]) -> list[str]:
    limits = []
    tested = {group: list(tasks_of(arm_results, group)) for group in ("task", "general")}
    if not tested["task"]:
        limits.append("The task was not measured: whether anything was gained is unknown.")
    if not tested["general"]:
        limits.append("General skills were not measured: what was forgotten is unknown.")
    else:
        tasks = ", ".join(markdown_text(label) for label in tested["general"])
        limits.append(f"Forgetting was looked for only with: {tasks}. Other abilities may have changed.")
    general = compare_group(arm_results, "general")
    if general and general.ci and general.ci[0] < 0:
        limits.append(f"By the interval above, a mean loss of up to {numbers.score(-general.ci[0])} on general skills is not excluded.")
    below = numbers.finite(mapping(results.get("guidance")).get("below_0.05"))
    if below is not None and below > 0.2 and _method_names(mapping(settings_of(results, arm).get("tune")).get("weights")):
        share = numbers.percent(below)
        limits.append(
            f"The teacher finds {share} of the target tokens improbable (below 0.05): guided weights can hold back what is new there."
        )
    if mapping(arm_results.get("tune")) or mapping(settings_of(results, arm).get("tune")):
        limits.append("One training seed: the intervals cover the choice of test items, not the spread between training runs.")
    limits.append("Safety, bias and refusal behaviour were not assessed unless a task above says so; assess them before use.")
    limits.append("The licences and terms of the base model, the instruct model and the data apply to this model.")
    return limits


def model_card(results: Mapping[str, Any], arm: str) -> str:
    """README.md for the model folder of one arm: what it is, how it was made, what was gained and lost, limits, how to load it.

    Raises:
        BadInput: the results hold no arm of this name.
    """
    arms = arms_of(results)
    if arm not in arms:
        from guidetune.errors import BadInput

        raise BadInput(f"the results hold no arm {arm!r}; they have: {', '.join(arms) or 'none'}")
    own = arms[arm]
    name = markdown_text(str(results.get("name") or "run"))
    models = mapping(results.get("models"))
    instruct = markdown_text(_spec(models.get("instruct")) or "an instruct model")
    verdict = next((verdict.text for verdict in verdicts(results) if verdict.arm == arm), "")
    evaluated = not failed(own) and (group_mean(own, "task") is not None or group_mean(own, "general") is not None)
    table = markdown(results, only=(arm, REFERENCE)) if evaluated else ""
    transfer = {
        str(key).replace("_", " "): value
        for key, value in mapping(own.get("transfer")).items()
        if isinstance(value, (str, int, float, bool))
    }
    versions = ", ".join(
        f"{markdown_text(str(key))} {markdown_text(str(value))}" for key, value in mapping(results.get("versions")).items()
    )
    year = "2026"
    parts = [
        front_matter(results, arm),
        f"# {name}: {markdown_text(arm)}\n\n{instruct}, specialised with guidetune ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})); arm "
        f"{markdown_text(arm)}.",
        *([markdown_text(str(own["description"]))] if own.get("description") else []),
        f"## How it was made\n\n{_how(results, arm)}",
        f"## Data\n\n{_data(results)}",
        f"## Gain and forgetting\n\n**{markdown_text(arm)}**: {markdown_text(verdict)}\n\n{table}"
        + (
            "\nPaired tests on the same items; \\* p < .05, \\*\\* p < .01, \\*\\*\\* p < .001, after Holm correction over the arms.\n"
            if evaluated
            else ""
        ),
        "## Limits\n\n" + "".join(f"- {line}\n" for line in _limits(results, arm, own)),
        *([f"## Transfer\n\n{_facts(transfer)}"] if transfer else []),
        "## How to load it\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its Hub id\ntokenizer = AutoTokenizer.from_pretrained(folder)\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
        'messages = [{"role": "user", "content": "..."}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "output = model.generate(**inputs, max_new_tokens=256)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n```\n',
        "## Citation\n\n```bibtex\n@inproceedings{gift" + year + ",\n"
        "  title     = {GIFT: Guided Fine-Tuning and Transfer for Enhancing Instruction-Tuned Language Models},\n"
        f"  booktitle = {{ACL}},\n  year      = {{{year}}},\n  eprint    = {{{PAPER}}},\n  archivePrefix = {{arXiv}}\n}}\n```\n",
        *(
            [f"Made {markdown_text(str(results.get('created')))} with {versions}." if results.get("created") else f"Made with {versions}."]
            if versions
            else []
        ),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)
