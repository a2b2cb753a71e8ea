"""What generates: the loop of `evaluation.generation`, or vLLM where it is installed and there is a GPU.

Both are given the same token ids, rendered once by us, the same stop tokens, and sampling options of our own: the ones in a checkpoint's
`generation_config` are never read. vLLM rounds differently (and samples from streams of its own), so its results are filed apart.

The vLLM part follows its documented offline interface (`LLM`, `SamplingParams`); it needs a GPU and is not run by this project's tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from guidetune.errors import BadInput
from guidetune.evaluation.generation import Completion, Sampling, fit_prompts, generate

if TYPE_CHECKING:
    from guidetune.models.handle import ModelHandle

Asked = Literal["auto", "hf", "vllm"]
Engine = Literal["hf", "vllm"]
Generate = Callable[..., Iterator[tuple[int, Completion]]]


def vllm_obstacle() -> str | None:
    """Why vLLM cannot be used on this machine, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; install it with pip install 'guidetune[serve]', or use engine: hf"
    import torch

    return None if torch.cuda.is_available() else "vLLM needs a GPU, and there is none here; use engine: hf"


def choose(asked: Asked, whole_folder: bool) -> Engine:
    """`auto` → vLLM when it is installed, a GPU is there and the model is a folder of full weights; else the loop of our own.

    Raises:
        BadInput: vLLM is asked for and cannot be used.
    """
    if asked == "hf" or (asked == "auto" and not whole_folder):
        return "hf"
    obstacle = vllm_obstacle()
    if obstacle is None and not whole_folder:
        obstacle = "vLLM loads folders of full weights, and this model is an adapter on another; merge it first, or use engine: hf"
    if obstacle is None:
        return "vllm"
    if asked == "vllm":
        raise BadInput(f"evaluate.engine: {obstacle}")
    return "hf"


@contextmanager
def generator(handle: ModelHandle, engine: Engine) -> Iterator[Generate]:
    """`generation.generate` for this model, by the engine; vLLM starts at the first call and is shut down afterwards."""
    if engine == "hf":
        yield lambda prompts, **options: generate(handle.model, prompts, **options)
        return
    served = _Vllm(handle)
    try:
        yield served
    finally:
        served.close()


def sampling_options(sampling: Sampling | None, room: int, stop: Sequence[int], seed: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for one prompt: everything that decides a token is written out."""
    how = sampling or Sampling()
    return {
        "temperature": how.temperature if sampling is not None else 0.0,
        "top_p": how.top_p,
        "top_k": how.top_k or -1,  # -1: all
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed % 2**31 if sampling is not None else None,
        "max_tokens": room,
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # the tokenizer's EOS may not be what ends a turn; `stop` says what does
        "detokenize": False,
    }


class _Vllm:
    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self._llm: Any = None

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[int],
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        context: int | None = None,
        tick: Callable[[int, int], None] | None = None,
        batch_tokens: int | None = None,  # vLLM lays out its own batches
    ) -> Iterator[tuple[int, Completion]]:
        from vllm import SamplingParams

        rows = fit_prompts(prompts, seeds, max_new_tokens, context)
        yield from ((row.index, Completion((), False, row.cut)) for row in rows if row.room <= 0)
        rows = [row for row in rows if row.room > 0]
        if not rows:
            return
        params = [SamplingParams(**sampling_options(sampling, row.room, stop, row.seed)) for row in rows]
        answers = self._start(context).generate([{"prompt_token_ids": list(row.prompt)} for row in rows], params, use_tqdm=False)
        for row, answer in zip(rows, answers, strict=True):
            tokens = list(answer.outputs[0].token_ids)
            finished = bool(tokens) and tokens[-1] in set(stop)  # vLLM keeps the stop token
            if tick is not None:
                tick(1, len(tokens) - finished)
            yield row.index, Completion(tuple(tokens[: len(tokens) - finished]), finished, row.cut)

    def _start(self, context: int | None) -> Any:
        if self._llm is None:
            import torch
            from vllm import LLM

            free, total = torch.cuda.mem_get_info()  # the model that scores log-likelihoods is there already
            self._llm = LLM(
                model=str(self.handle.folder),
                dtype=str(self.handle.model.dtype).removeprefix("torch."),
                max_model_len=context,
                skip_tokenizer_init=True,
                generation_config="vllm",  # vLLM's own neutral defaults instead of the checkpoint's
                gpu_memory_utilization=round(0.9 * free / total, 3),
                seed=0,
            )
        return self._llm

    def close(self) -> None:
        if self._llm is not None:
            import gc

            import torch

            self._llm = None
            gc.collect()
            torch.cuda.empty_cache()
