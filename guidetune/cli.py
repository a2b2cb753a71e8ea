"""The `guidetune` command: each verb calls one public function, imported when the verb runs."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from guidetune import processes, threads
from guidetune.errors import BadInput, RunFailed
from guidetune.progress import hush

if TYPE_CHECKING:
    from guidetune.recipe import Recipe

app = typer.Typer(
    name="guidetune",
    help="Specialise an instruction-tuned language model on a task without breaking it, and see the evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
world_app = typer.Typer(help="The embedded world: a small base/instruct pair and its tasks.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(world_app, name="world")


class _PlanOrVerb(TyperGroup):
    """`merge PLAN` beside `merge diff A B`: what is no verb of the group goes to `write`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["write", *args]
        return super().parse_args(ctx, args)


merge_app = typer.Typer(
    cls=_PlanOrVerb,
    help="Write a model from adapters and models: `guidetune merge PLAN.yaml --out DIR` (short for `merge write`, whose --help has the "
    "options). Or compare two models, or turn one into an adapter.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(merge_app, name="merge", short_help="Write a model from adapters and models, or compare two.")
runs_app = typer.Typer(help="What was run here, and how it ended.", rich_markup_mode=None)
app.add_typer(runs_app, name="runs")

SHARED_VERBS = ("run", "compare", "demo", "guide", "evaluate")  # functions whose work several processes share
PATIENCE = 5.0  # seconds in which a launcher ends the processes beside one that has failed
GLOBAL_FLAGS = ("--debug", "-v", "--verbose", "-q", "--quiet")
_debug = False

AllowCode = Annotated[bool, typer.Option("--allow-code", help="Tasks may run programs that the model wrote, in a sandbox.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML); docs/recipe.md describes it.", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, e.g. tune.lr=1e-4. May be repeated.")
]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Memory it may take, e.g. 8GB; it is made to fit, or refused.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: runs/ and the recipe's name.")]


# ---------------------------------------------------------------------------------------------------------------------
# Errors and exit codes


def verb(function: Callable[..., int | None]) -> Callable[..., None]:
    """A verb with guidetune's exit codes: 0 ok, 1 failed run, 2 bad input, 130 interrupted; no traceback unless --debug."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        code: int | None = 0
        if processes.count() > 1 and not _joins(function.__name__):
            raise typer.Exit(0)
        try:
            code = function(*args, **kwargs)
            sys.stdout.flush()
        except (BadInput, RunFailed) as error:
            if _debug:
                raise
            _fail(str(error) or type(error).__name__, error)
            code = error.exit_code
        except BrokenPipeError:
            # The reader of our output has gone (`| head`): nothing to say, and nobody to say it to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        except KeyboardInterrupt:
            _fail("interrupted. What is finished is kept; run the same command to continue.", KeyboardInterrupt())
            code = 130
        except MemoryError as error:
            if _debug:
                raise
            _fail("out of memory; lower tune.micro_tokens, guide.batch_tokens or evaluate.batch_tokens. What is finished is kept.", error)
            code = 1
        except Exception as error:
            if _debug:
                raise
            _fail(f"{_what(error)}\nThis is unexpected; `guidetune --debug ...` shows where it happened.", error)
            code = 1
        if processes.count() > 1:
            _leave(code or 0)
        raise typer.Exit(code or 0)

    return run


def _what(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _fail(text: str, error: BaseException) -> None:
    """Say on standard error why the command ends; of several processes, the one that knows says it."""
    if processes.rank() and not _speaks(error):
        return
    lines = text.splitlines()
    if processes.rank():
        lines[0] = f"rank {processes.rank()}: {lines[0]}"
    try:
        print(f"error: {lines[0]}" if len(lines) == 1 else "error:\n  " + "\n  ".join(lines), file=sys.stderr, flush=True)
    except OSError:
        pass  # standard error is closed too


def _speaks(error: BaseException) -> bool:
    """Whether a process other than rank 0 has to report an error: not one that rank 0 has met too.

    The launcher ends this process as soon as another has ended, so waiting tells the two apart.
    """
    if getattr(error, "on_every_rank", False) or isinstance(error, KeyboardInterrupt):
        time.sleep(PATIENCE)
        return False
    from_start = processes.local_rank() and isinstance(error, BadInput)  # the neighbour with rank 0 reads the same recipe
    if from_start or type(error).__name__ == "Lost":
        time.sleep(PATIENCE)
    return True


def _joins(verb: str) -> bool:
    """Whether several processes share a verb's work; other verbs are left to rank 0, as if it had been started alone."""
    if verb in SHARED_VERBS:
        return True
    if processes.rank():
        return False
    processes.stay_alone()
    return True


def _leave(code: int) -> NoReturn:
    """End one of several processes: at once after an error (an exit that waits for lost peers could hang), else together."""
    if code == 0:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_initialized():
            distributed.destroy_process_group()
        raise typer.Exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    threads.settle()
    hush()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end a run
    # The global flags may stand anywhere, also behind the verb.
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    flags = [a for i, a in enumerate(own) if a in GLOBAL_FLAGS and (i == 0 or own[i - 1] not in ("--prompt", "--system"))]
    rest = [a for i, a in enumerate(own) if a not in GLOBAL_FLAGS or (i > 0 and own[i - 1] in ("--prompt", "--system"))]
    app(flags + rest + arguments[len(own) :], prog_name="guidetune")
    sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        from guidetune import __version__

        print(f"guidetune {__version__}")
        raise typer.Exit(0)


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results only.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    global _debug
    _debug = debug
    if debug:
        os.environ["GUIDETUNE_DEBUG"] = "1"
    from guidetune import threads
    from guidetune.progress import set_verbosity

    threads.settle()
    set_verbosity(1 if verbose else -1 if quiet else 0)
    if processes.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - rank 0 shows the results


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@app.command()
@verb
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to write.")] = Path("runs/demo"), max_memory: MaxMemory = None
) -> None:
    """Compare the methods on the embedded pair, offline."""
    _check_size(max_memory)
    from guidetune import pipeline

    _show_run(lambda: pipeline.demo(out, max_memory), out)


@app.command()
@verb
def run(recipe: RecipeFile, sets: Sets = None, out: Out = None, max_memory: MaxMemory = None, allow_code: AllowCode = False) -> None:
    """Execute a recipe; running again continues.

    Prepare the data, ask the teacher, tune, transfer, evaluate, report.
    """
    loaded = _load(recipe, _with_code(sets, allow_code), max_memory)
    folder = _out(out, loaded)
    from guidetune import pipeline

    _show_run(lambda: pipeline.run(loaded, folder), folder)


@app.command()
@verb
def compare(
    recipe: RecipeFile,
    arms: Annotated[str, typer.Option("--arms", metavar="A,B,...", help="Arms, separated by commas.")] = "instruct,sft,graft,gift",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Repeat every tuned arm with N seeds.")] = 1,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", metavar="KEY=A,B", help="Every tuned arm with each value, e.g. tune.lr=1e-4,3e-4.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option("--scales", metavar="S,S,...", help="Also merge at these scales (0:1.5:0.25: from, to, step).")
    ] = None,
    pick: Annotated[
        str, typer.Option("--pick", metavar="RULE", help="How a scale is picked on validation items: retain or mean.")
    ] = "retain",
    max_loss: Annotated[
        float, typer.Option("--max-loss", min=0.0, help="retain: how much of the general score may be lost; 0.02: two points.")
    ] = 0.02,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=1, help="Arms at a time, each in a process, as far as memory allows.")
    ] = 1,
    unequal_budget: Annotated[
        bool, typer.Option("--unequal-budget", help="Allow arms that see different numbers of rows, tokens or steps.")
    ] = False,
    sets: Sets = None,
    out: Out = None,
    max_memory: MaxMemory = None,
    allow_code: AllowCode = False,
) -> None:
    """Execute several arms of a recipe side by side.

    All have the same data, budget and seeds. Arms: instruct, base-sft, sft, graft, gift, gift-base-teacher, guided, dft, stm,
    re-adapt and the recipe's own (docs/compare.md).
    """
    from guidetune.recipe import arms as arm_recipes

    loaded = _load(recipe, _with_code(sets, allow_code), max_memory)
    names = [name.strip() for name in arms.split(",") if name.strip()]
    arm_recipes(loaded, names, grid or ())  # a wrong name is said before anything heavy is loaded
    if pick not in ("retain", "mean"):
        raise BadInput(f"--pick {pick}: the rules are retain and mean")
    folder = _out(out, loaded)
    from guidetune import pipeline
    from guidetune.comparison.scales import Selection, parse_scales

    points = parse_scales(scales) if scales is not None else ()
    selection = Selection(rule=pick, max_loss=max_loss)
    options = {"grid": grid or (), "jobs": jobs, "scales": points, "selection": selection, "unequal_budget": unequal_budget}
    _show_run(lambda: pipeline.compare(loaded, names, folder, seeds, **options), folder)


@app.command()
@verb
def claims(
    paper: Annotated[str | None, typer.Argument(metavar="[PAPER]", help="A paper; without one, what there is.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds of every arm that is tuned.")] = 5,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the findings as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps on a few items: shows that it works, measures nothing.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, help="Arms at a time.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: runs/claims-PAPER.")] = None,
) -> None:
    """Check a paper's claims on the embedded world.

    Exit code 0 also when a claim does not hold: that is a finding, not a failure.
    """
    from guidetune import claims as registry

    if paper is None:
        for name in registry.names():
            found = registry.load(name)
            print(f"{name:<12} arXiv {found.paper}, {len(found.claims)} claims in {', '.join(found.settings)}: {found.title}")
        return
    found = registry.load(paper)
    folder = out or Path("runs") / (f"claims-{paper}" + ("-quick" if quick else ""))
    checked = registry.check(found, folder, seeds, quick=quick, jobs=jobs)
    _print(registry.table(checked))
    if json is not None:
        from guidetune.artefacts import write_json

        write_json(json, checked)
    print(f"claims: {folder / 'claims.json'}")


@app.command()
@verb
def data(
    recipe: RecipeFile,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Rows to show token by token.")] = 3,
    export: Annotated[Path | None, typer.Option("--export", metavar="FILE", help="Write the encoded rows as JSON lines.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")] = None,
    max_dropped: Annotated[
        str | None, typer.Option("--max-dropped", metavar="N", help="Fail when more rows have a fault: 10 rows, or 0.01 of them.")
    ] = None,
    max_leaks: Annotated[str | None, typer.Option("--max-leaks", metavar="N", help="Fail when more rows have a test prompt.")] = None,
    max_duplicates: Annotated[
        str | None, typer.Option("--max-duplicates", metavar="N", help="Fail when more rows nearly repeat an earlier one.")
    ] = None,
    sets: Sets = None,
    out: Out = None,
) -> None:
    """Audit the data of a recipe.

    What each operation did, what became of every row, the tokens that are learnt, lengths, stop tokens, duplicates, leaks, labels,
    languages and diversity. A limit that is passed is exit code 2.
    """
    given = {"dropped": max_dropped, "leaks": max_leaks, "duplicates": max_duplicates}
    limits = {name: _limit(f"--max-{name}", text) for name, text in given.items()}
    loaded = _load(recipe, sets)
    from guidetune import pipeline

    place = _out(out, loaded)
    folder = pipeline.prepare_data(loaded, place).path
    from guidetune.data import figures, view

    guidance = _guidance_of(place, folder)
    found = figures.figures(folder, _test_prompts(loaded))
    _print(view.audit(folder, show=show, guidance=guidance, found=found))
    if json is not None:
        from guidetune.artefacts import write_json

        write_json(json, found)
    if export is not None:
        count = view.export(folder, export, guidance)
        print(f"{count:,} rows written to {export}")
    print(f"data: {folder}")
    figures.check(found, limits)


@app.command()
@verb
def guide(
    recipe: RecipeFile,
    export: Annotated[Path | None, typer.Option("--export", metavar="FILE", help="Write the scores as JSON lines.")] = None,
    sets: Sets = None,
    out: Out = None,
) -> None:
    """Only the teacher pass of a recipe.

    How confident the instruct model is in the targets.
    """
    loaded = _load(recipe, sets)
    from guidetune import pipeline

    _print(pipeline.guide(loaded, _out(out, loaded), export=export))


@app.command()
@verb
def score(
    recipe: RecipeFile,
    export: Annotated[Path | None, typer.Option("--export", metavar="FILE", help="Write id and scores as JSON lines.")] = None,
    sets: Sets = None,
    out: Out = None,
) -> None:
    """Only the scores of a recipe's rows.

    A histogram of each score in data.scores, and the phases that tune.phases makes of them.
    """
    loaded = _load(recipe, sets)
    from guidetune import pipeline

    _print(pipeline.score(loaded, _out(out, loaded), export=export))


@app.command()
@verb
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; default: RUN/report.html or comparison.html.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Also write every table there, as CSV and Markdown.")
    ] = None,
) -> None:
    """Write the page of a run again, or put several runs side by side.

    Of several runs it shows which recipe keys differ and which results; scores of other items or settings are not subtracted.
    """
    from guidetune import report as pages

    page = pages.write(runs[0], out, export) if len(runs) == 1 else pages.write_comparison(runs, out, export)
    if export is not None:
        print(f"tables: {export}")
    print(f"report: {page}")


# ---------------------------------------------------------------------------------------------------------------------
# Models


@merge_app.command("write")
@verb
def merge(
    plan: Annotated[Path | None, typer.Argument(metavar="[PLAN]", help="A merge plan (YAML).", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the new model.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="Instead of a plan: an adapter folder ...")] = None,
    into: Annotated[str | None, typer.Option("--into", metavar="MODEL", help="... and the model that receives it.")] = None,
    scale: Annotated[float, typer.Option("--scale", help="The change is multiplied by this.")] = 1.0,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the written weights.")] = "auto",
    verify: Annotated[str, typer.Option("--verify", help="full, weights, none; auto: full up to 2 GB.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a PLAN would do, and write nothing.")] = False,
) -> None:
    """Write a model from a plan (docs/merge.md), or from one adapter and the model that receives it."""
    problems = []
    if (plan is None) == (adapter is None):
        problems.append("merge: give either a PLAN or --adapter DIR --into MODEL")
    elif adapter is not None and into is None:
        problems.append("merge --adapter: name the model that receives it with --into MODEL")
    elif plan is not None and (into is not None or scale != 1.0 or dtype != "auto"):
        problems.append("merge PLAN: --into, --scale and --dtype belong to --adapter; write them into the plan")
    if dry_run and plan is None:
        problems.append("merge --dry-run: give a PLAN")
    if out is None and not dry_run:
        problems.append("merge: name the new folder with --out DIR")
    if problems:
        raise BadInput(problems)
    if dry_run:
        from guidetune.weightspace.plan import preview

        print(preview(plan))
        return
    if plan is not None:
        from guidetune.weightspace.plan import merge as merge_plan

        result = merge_plan(plan, out, verify=verify)
    else:
        from guidetune.weightspace.apply import transfer

        result = transfer(adapter, into, out, scale=scale, dtype=dtype, verify=verify)
    print(f"{'adapter' if (result.path / 'adapter_config.json').is_file() else 'model'}: {result.path}")


@merge_app.command("diff")
@verb
def merge_diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model: folder, hub id, world: name or adapter folder.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The model to compare it with.", show_default=False)],
    base: Annotated[str | None, typer.Option("--base", metavar="M", help="Compare the changes A - M and B - M instead.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write a page with plots, diff.json and CSV files.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers of every tensor.")] = None,
    rank: Annotated[
        str, typer.Option("--rank", help="Effective rank of: exact (every matrix), auto (smaller side up to 4,096), none (fastest).")
    ] = "auto",
) -> None:
    """How two models differ, by tensor, layer and kind of module: norms, cosine, signs, effective rank."""
    from guidetune.artefacts import write_json
    from guidetune.report import differences
    from guidetune.weightspace.diff import compare

    found = compare(a, b, base, rank)  # type: ignore[arg-type]
    for table in differences.tables(found):
        _print(table)
    if json_file is not None:
        write_json(json_file, found.as_dict())
    if out is not None:
        print(f"page: {differences.write(found, out)}")


@merge_app.command("extract")
@verb
def merge_extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model.", show_default=False)],
    base: Annotated[str, typer.Option("--of", metavar="BASE", help="The model it was tuned from, which the adapter will belong to.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the adapter.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of every module; with --energy the largest one.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Smallest rank that keeps this share of the squared change.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the written factors: float32, bfloat16 or float16.")] = "float32",
    save_modules: Annotated[
        bool, typer.Option("--save-modules", help="Store changed norms and embeddings whole beside the factors.")
    ] = False,
) -> None:
    """Turn a tuned model into a LoRA adapter for its base, by SVD of every linear module's change."""
    from guidetune.report import differences
    from guidetune.weightspace.adapters import extract

    done = extract(tuned, base, out, rank, energy, dtype, save_modules)
    _print(differences.extracted(done.result))
    print(f"adapter: {done.path}")


@app.command("eval")
@verb
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, adapter folder, hub id or world:instruct.", show_default=False)],
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks", metavar="A,B", help="Tasks: gsm8k, gsm8k:path=F,limit=100, {method: gsm8k, path: F} or your own mytask.yaml."
        ),
    ],
    data: Annotated[Path | None, typer.Option("--data", metavar="PATH", help="File of the task, or folder with a file for each.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An evaluation setting, e.g. limit=100 or max_new_tokens=256.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: runs/eval-MODEL.")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Score a model on tasks."""
    from guidetune.recipe import evaluation

    section = evaluation(tasks, data, [*(sets or ()), *(["allow_code=true"] if allow_code else [])])
    from guidetune import pipeline

    folder = out or Path("runs") / ("eval-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in model).strip("-"))
    results = pipeline.evaluate_model(model, section, folder)
    _print(_score_table(results))
    from guidetune.evaluation.results import curve_table

    _print(curve_table(results))
    for label, result in results.items():
        for note in result.get("notes", ()):
            print(f"{label}: {note}")
    print(f"results: {folder}")


@app.command()
@verb
def chat(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One model, or several side by side.", show_default=False)],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this once and leave.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling.")] = 42,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the weights.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Talk to one or several models.

    Reads lines from standard input. /reset, /system TEXT, /help, /quit.
    """
    from guidetune.chat import Answering
    from guidetune.chat import chat as talk

    talk(models, prompt, system, Answering(max_new_tokens, temperature, seed), dtype, device)


@app.command()
@verb
def serve(
    model: Annotated[str, typer.Argument(help="A model folder, adapter folder, hub id or world:instruct.", show_default=False)],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    key_env: Annotated[
        str | None, typer.Option("--key-env", metavar="NAME", help="Ask callers for the key in this environment variable.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the weights.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Serve a model at an OpenAI-compatible address.

    For a local judge, a chat page or a test; until Ctrl-C.
    """
    key = os.environ.get(key_env) if key_env is not None else None
    if key_env is not None and not key:
        raise BadInput(f"--key-env {key_env}: that environment variable is not set")
    from guidetune import serve as server

    server.serve(model, host, port, key, dtype, device)


@app.command()
@verb
def doctor(
    base: Annotated[str, typer.Argument(help="The base model.", show_default=False)],
    instruct: Annotated[str, typer.Argument(help="The instruct model.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the findings as JSON.")] = None,
) -> int:
    """May this pair be used together? Exit code 1 when not."""
    from guidetune.models.pair import check_pair, render_doctor

    report = check_pair(base, instruct)
    if out is not None:
        from guidetune.artefacts import write_json

        write_json(out, {"problems": report.problems, "warnings": report.warnings, "facts": report.facts})
    _print(render_doctor(report))
    from guidetune.engine.memory import outlook
    from guidetune.models.sources import resolve

    print(outlook(resolve(base).path))
    return 1 if report.problems else 0


# ---------------------------------------------------------------------------------------------------------------------
# The index of runs

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, id or name.", show_default=False)]
Statuses = Annotated[
    list[str] | None, typer.Option("--status", metavar="S", help="Only running, ok, failed, interrupted, unknown or gone. May be repeated.")
]


@runs_app.callback(invoke_without_command=True)
def _runs(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        runs_list()


@runs_app.command("list")
@verb
def runs_list(
    status: Statuses = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", metavar="K", help="Only run, compare or eval. May be repeated.")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="PATTERN", help="Only names like this, with * and ?.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="TEXT", help="Only runs of models with this in their name.")] = None,
    arm: Annotated[str | None, typer.Option("--arm", metavar="ARM", help="Only runs with results of this arm.")] = None,
    since: Annotated[str | None, typer.Option("--since", metavar="WHEN", help="Only runs begun since a date, or within e.g. 7d.")] = None,
    sort: Annotated[
        str, typer.Option("--sort", metavar="KEY", help="started, seconds, name, kind, status, task, general or folder.")
    ] = "started",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most N runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """List the runs of this machine, newest first."""
    from guidetune import runs

    options: dict[str, Any] = {"name": name, "model": model, "arm": arm, "since": since, "sort": sort, "reverse": reverse, "limit": limit}
    found = runs.select(runs.every(), status=status or (), kind=kind or (), **options)
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps([{"id": run.id, **asdict(run)} for run in found], indent=1, ensure_ascii=False))
        return
    _print(_runs_table(found) if found else "no runs to show; `guidetune runs scan DIR` looks for run folders")


@runs_app.command("show")
@verb
def runs_show(name: RunName) -> None:
    """A run's state, models, scores and files."""
    from guidetune import runs
    from guidetune.artefacts import read_json
    from guidetune.report import numbers

    run = runs.pick(name)
    facts = {
        "id": run.id,
        "folder": run.folder,
        "kind": run.kind,
        "status": run.status + (f": {run.error}" if run.error else ""),
        "started": _moment(run.started),
        "took": numbers.duration(run.seconds),
        "base": run.base,
        "instruct": run.instruct,
    }
    print("\n".join(f"{key:<9} {value}" for key, value in facts.items() if value is not None))
    folder = Path(run.folder)
    if (folder / "results.json").is_file():
        results = read_json(folder / "results.json")
        if "tasks" in results:
            _print(_score_table(results["tasks"]))
        else:
            from guidetune.report.tables import arms_table

            _print(arms_table(results))
    for file in ("report.html", "recipe.yaml", "results.json"):
        if (folder / file).is_file():
            print(f"{file:<13} {folder / file}")


@runs_app.command("diff")
@verb
def runs_diff(
    a: RunName,
    b: RunName,
    arms: Annotated[str | None, typer.Option("--arms", metavar="A,B", help="This arm of the first against that of the second.")] = None,
) -> None:
    """Compare two runs: recipes and scores.

    Shows the keys that differ, and every task's scores side by side, with paired tests where the items are the same.
    """
    from guidetune import runs

    named = tuple(part.strip() for part in arms.split(",")) if arms else None
    if named is not None and len(named) != 2:
        raise BadInput(f"runs diff --arms {arms}: name two arms, as gift,sft")
    found = runs.diff(runs.pick(a), runs.pick(b), named)  # type: ignore[arg-type]
    for line in _difference(found):
        _print(line)


@runs_app.command("delete")
@verb
def runs_delete(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders, ids or names.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete runs, after asking.

    What guidetune did not write stays, and so does its folder then. Links are never followed.
    """
    from guidetune import runs

    chosen = list({run.folder: run for run in map(runs.pick, names)}.values())
    for run in chosen:
        if run.status != "gone":
            runs.deletable(run)  # everything that can be refused is, before anything is deleted
        print(f"{run.id}  {run.status:<12} {run.name:<20} {run.folder}")
    if not yes:
        if not sys.stdin.isatty():
            raise BadInput("runs delete: nobody is there to ask; give --yes to delete these")
        if input(f"Delete {'this run' if len(chosen) == 1 else f'these {len(chosen)} runs'} for good? [y/N] ").strip().lower() not in (
            "y",
            "yes",
        ):
            print("nothing was deleted")
            return
    for run in chosen:
        left = runs.delete(run)
        print(f"deleted {run.folder}" + (f", but for {', '.join(path.name for path in left)}" if left else ""))


@runs_app.command("scan")
@verb
def runs_scan(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="DIR...", help="Where to look; default: runs.", show_default=False)
    ] = None,
) -> None:
    """Index the runs below a folder.

    Entries whose folders are gone are forgotten.
    """
    from guidetune import runs

    found = runs.scan(folders or [Path("runs")])
    _print(_runs_table(runs.select(found)) if found else None)
    print(f"{len(found)} run{'s' * (len(found) != 1)} found")


# ---------------------------------------------------------------------------------------------------------------------
# What there is


@app.command()
@verb
def methods(name: Annotated[str | None, typer.Argument(help="A method, a kind, or kind/name.", show_default=False)] = None) -> None:
    """List the methods, or the options of one."""
    from guidetune import reference, registry

    if name is None or name in registry.KINDS:
        _print(_method_list(list(reference.methods(name))))
        print("guidetune methods NAME shows the options of one.")
        return
    for cls in reference.find(name):
        _print(_method_page(cls))


@world_app.command("export")
@verb
def world_export(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to.", show_default=False)]) -> None:
    """Write base/, instruct/ and the other pairs' models as ordinary model folders, and the task files."""
    from guidetune import world

    for name, path in world.export(folder).items():
        print(f"{name:<24} {path}")


@world_app.command("describe")
@verb
def world_describe(
    pair: Annotated[str, typer.Option("--pair", metavar="NAME", help="Whose scores: general or data.")] = "general",
) -> None:
    """What the world holds: its tasks, and what a pair scores on them."""
    import json

    from guidetune import world

    described = world.describe(pair)
    from rich.table import Table

    table = Table("set", "category", "definition", box=None, pad_edge=False, header_style="bold")
    for name, one in described["sets"].items():
        table.add_row(name, one["category"], one["definition"])
    _print(table)
    if described["report"] is not None:
        print("\n" + json.dumps(described["report"], indent=1, ensure_ascii=False))


@world_app.command("build")
@verb
def world_build(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; default: the package's own weights.")] = None,
    pair: Annotated[str, typer.Option("--pair", metavar="NAME", help="Which pair: general or data.")] = "general",
) -> None:
    """Make a pair again from its seed (takes long)."""
    from guidetune import world

    world.build(out, name=pair)
    from guidetune.world.export import WEIGHTS

    print(f"world: {out or WEIGHTS}")


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def _load(path: Path, sets: list[str] | None, max_memory: str | None = None) -> Recipe:
    from guidetune.recipe import load

    _check_size(max_memory)
    return load(path, [*(sets or ()), *([f"max_memory={max_memory}"] if max_memory else [])])


def _with_code(sets: list[str] | None, allow_code: bool) -> list[str]:
    return [*(sets or ()), *(["evaluate.allow_code=true"] if allow_code else [])]


def _check_size(size: str | None) -> None:
    import re

    if size is not None and not re.fullmatch(r"\d+(\.\d+)?\s?[KMGT]i?B", size):
        raise BadInput(f"--max-memory {size}: write a size like 8GB or 512MiB")


def _out(out: Path | None, recipe: Recipe) -> Path:
    return out if out is not None else Path("runs") / recipe.name


def _show_run(work: Callable[[], Path], folder: Path) -> None:
    """Do a run, then show its table and where its report is; also when some of its arms failed."""
    began = time.time()
    try:
        folder = work()
    except RunFailed:
        if _written_since(folder / "results.json", began):
            _show_results(folder)
        raise
    _show_results(folder)


def _written_since(path: Path, began: float) -> bool:
    try:
        return path.stat().st_mtime >= began - 2  # some file systems keep whole seconds
    except OSError:
        return False


def _show_results(folder: Path) -> None:
    from guidetune.artefacts import read_json
    from guidetune.report.tables import arms_table

    results = read_json(folder / "results.json")
    _print(arms_table(results))
    if results.get("budget") and results.get("budget_equal"):
        spent = next(iter(results["budget"].values()))
        print(f"Each tuned arm: {spent['rows']:,} rows, {spent['supervised_tokens']:,} supervised tokens, {spent['steps']:,} steps.")
    for line in results.get("comparison", {}).get("verdict", []):
        print(line)
    for name, sweep in results.get("scales", {}).items():
        print(f"{name}: scale {sweep['chosen']:g} is {sweep['criterion']}.")
        print("\n".join(sweep["verdict"]))
    print(f"report: {folder / 'report.html'}")


def _guidance_of(run: Path, data: Path) -> Any:
    """The run's teacher pass over these rows, when there has been one: it colours the tokens."""
    from guidetune.artefacts import finished
    from guidetune.data.rows import EncodedRows
    from guidetune.guidance import Guidance

    folder = run / "guidance" / "instruct"
    if finished(folder) is None:
        return None
    guidance = Guidance.open(folder)
    return guidance if len(guidance) == len(EncodedRows.open(data)) else None


def _limit(option: str, text: str | None) -> int | float | None:
    """A number of rows, or a share of them when it has a decimal point."""
    if text is None:
        return None
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if value < 0 or (isinstance(value, float) and value > 1):
        raise BadInput(f"{option} {text}: a number of rows (0, 10), or a share of them with a decimal point (0.01)")
    return value


def _test_prompts(recipe: Recipe) -> list[str] | None:
    """Every prompt that the recipe evaluates with, to look for in the training rows."""
    if recipe.evaluate is None:
        return None
    from guidetune.evaluation.task import TaskContext

    context = TaskContext(recipe.root)
    return [item.question or item.prompt for task in [*recipe.evaluate.task, *recipe.evaluate.general] for item in task.items(context)]


def _print(what: Any) -> None:
    """Text as it is, tables through rich (as wide as they need to be when nobody is at a terminal)."""
    if what is None:
        return
    if isinstance(what, str):
        print(what)
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(what)


def _method_list(found: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from guidetune.reference import paper_of

    table = Table("kind", "method", "paper", "what it does", box=None, pad_edge=False, header_style="bold")
    last = None
    for cls in found:
        table.add_row(cls.kind if cls.kind != last else "", cls.name, paper_of(cls), Text(cls.summary))
        last = cls.kind
    return table


def _method_page(cls: Any) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from guidetune import reference

    head = f"{cls.name} ({cls.kind})" + (f", {reference.paper_of(cls)}" if cls.paper else "")
    parts: list[Any] = [Text(head, style="bold"), Text(cls.summary), Text("\n  " + reference.example(cls) + "\n")]
    table = Table("option", "value", "default", "meaning", box=None, pad_edge=False, header_style="bold")
    for row in reference.options(cls):
        table.add_row(*map(Text, row))
    return Group(*parts, table if cls.model_fields else Text("no options"), Text())


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _runs_table(found: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from guidetune.report import numbers

    table = Table("id", "name", "kind", "status", "started", "took", "best arm", "task", "general", "folder", box=None, pad_edge=False)
    table.header_style = "bold"
    colours = {"ok": "green", "failed": "red", "interrupted": "yellow", "running": "cyan"}
    for run in found:
        state = Text(run.status, style=colours.get(run.status, "dim"))
        values = [numbers.score(run.score(group)) for group in ("task", "general")]
        took = numbers.duration(run.seconds)
        # ids and folders are there to be copied: never cut
        table.add_row(
            run.id, Text(run.name), run.kind, state, _moment(run.started), took, run.best or "", *values, Text(_short_path(run.folder))
        )
    for column in table.columns:
        column.no_wrap = column.header != "folder"
        column.overflow = "fold"
    return table


def _short_path(folder: str) -> str:
    """Relative to the current folder where it lies below it."""
    try:
        return str(Path(folder).relative_to(Path.cwd()))
    except ValueError:
        return folder


def _difference(found: Any) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    from guidetune.report import numbers

    def told(value: Any) -> Text:
        return Text("–", style="dim") if value is ... else Text(str(value))

    lines: list[Any] = [f"a: {found.a.id} {found.a.name}  {found.a.folder}", f"b: {found.b.id} {found.b.name}  {found.b.folder}", ""]
    if found.keys:
        keys = Table("recipe", "a", "b", box=None, pad_edge=False, header_style="bold")
        for key, x, y in found.keys:
            keys.add_row(Text(key), told(x), told(y))
        lines += [keys, ""]
    else:
        lines += ["the recipes are the same", ""]
    if not found.pairs:
        return [*lines, "no arm has results in both; name two with --arms A,B"]
    table = Table("arm", "group", "task", "a", "b", "a - b", "95 % interval", "p", "only a/only b right", box=None, pad_edge=False)
    table.header_style = "bold"
    for pair in found.pairs:
        arm = pair.arms[0] if pair.arms[0] == pair.arms[1] else " / ".join(pair.arms)
        x, y = (numbers.score(one["score"]) if one is not None else "–" for one in (pair.a, pair.b))
        test = pair.test
        if test is None:
            table.add_row(arm, pair.group, Text(pair.task), x, y, Text(pair.why, style="dim"))
            continue
        p = f"{numbers.p_value(test['p'])} {numbers.stars(test['p'])}".strip()
        changed = f"{test['gained']}/{test['lost']}"
        table.add_row(arm, pair.group, Text(pair.task), x, y, numbers.signed(test["diff"]), numbers.interval(test["ci"]), p, changed)
    return [*lines, table, "paired tests on the same items, uncorrected: * p<.05 ** p<.01 *** p<.001"]


def _score_table(results: dict[str, Any]) -> Any:
    from rich.table import Table

    from guidetune.report import numbers

    table = Table("task", "metric", "score", "95 % interval", "n", "also", box=None, pad_edge=False, header_style="bold")
    for label, result in results.items():
        score, interval = numbers.score(result.get("score")), numbers.interval(result.get("ci"))
        also = ", ".join(f"{key} {numbers.score(value)}" for key, value in result["metrics"].items() if key != result["metric"])
        table.add_row(label, str(result.get("metric", "")), score, interval, numbers.count(result.get("n")), also)
    return table
