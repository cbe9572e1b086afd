"""A yes/no teacher on vLLM: one token is generated, and of it the logits of the answers are read.

The engine lives in the worker that judges a part, so parts, cache and rejects are those of every other
teacher. vLLM's own score task is not used: it is going away, and in ray.data.llm it takes no pairs.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from retrieval_ray.errors import UserError
from retrieval_ray.model_code import Source
from retrieval_ray.model_files import resolve_model
from retrieval_ray.teachers import yes_no
from retrieval_ray.teachers.loading import KEY, load_tokenizer, token_ids
from retrieval_ray.teachers.pairs import Scores
from retrieval_ray.tokens import count_read


class VllmYesNo:
    """The same call and the same numbers, but for their last bits, as ``yes_no.YesNo``.

    engine: arguments of ``vllm.LLM`` over ours. Raises ``UserError`` where vLLM is not installed or
    cannot start.
    """

    def __init__(
        self,
        model: Source,
        *,
        max_tokens: int,
        template: str,
        instruction: str,
        tokens: Sequence[str],
        precision: str,
        engine: dict[str, Any],
        on_gpu: bool,
        trust_remote_code: bool = False,
    ) -> None:
        # in this process: it ends when the worker does, however that ends
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if not on_gpu:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                f"teacher.engine=vllm: vLLM cannot be imported ({error}); install the 'gpu' extra, or take "
                "teacher.engine=transformers"
            ) from error
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.tokens = token_ids(tokenizer, tokens)
        self.template = yes_no.prompts(tokenizer, max_tokens, template, instruction)
        defaults: dict[str, Any] = {"dtype": precision, "enable_prefix_caching": True, "seed": 0}
        if not on_gpu:
            defaults |= {"enforce_eager": True}
        try:
            self.llm = LLM(
                **(
                    defaults
                    | {"max_model_len": max_tokens + 1}
                    | engine
                    | {
                        "model": resolve_model(model, KEY, trust_remote_code=trust_remote_code),
                        "trust_remote_code": trust_remote_code,
                        "logprobs_mode": "raw_logits",
                        "disable_log_stats": True,
                    }
                )
            )
        except Exception as error:  # whatever vLLM finds: too little memory, a model it does not know ...
            raise UserError(
                f"{KEY}: vLLM could not start: {type(error).__name__}: {error}. What it found stands above "
                "that in the worker logs of this Ray session. Where memory is short, lower "
                "teacher.max_tokens, or spread the model: teacher.vllm.tensor_parallel_size"
            ) from error
        self.sampling = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=self.tokens)

    def score(self, queries: Sequence[str], passages: Sequence[str]) -> Scores:
        """Raw scores of the pairs, in their order."""
        rows = self.template.rows(queries, passages)
        count_read(sum(map(len, rows)))
        outputs = self.llm.generate(
            [{"prompt_token_ids": row} for row in rows], self.sampling, use_tqdm=False
        )
        logits_NT = np.array(
            [[output.outputs[0].logprobs[0][token].logprob for token in self.tokens] for output in outputs],
            dtype=np.float32,
        ).reshape(len(rows), len(self.tokens))
        found: Scores = logits_NT[:, 0] - (logits_NT[:, 1] if len(self.tokens) == 2 else 0)
        return found
