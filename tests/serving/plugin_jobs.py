"""Jobs for vLLM with the plugin: runs with the interpreter of vLLM's environment, which finds vlparts on its path.

`python -m tests.serving.plugin_jobs JOBS RESULTS`: both are JSON files. A job names one of the functions here and its
arguments; its result is what the function returns, or the error as text. Engines run one after the other.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.serving.http_requests import stream, with_files
from tests.serving.vllm_process import running_server

LIMITS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, "seed": 0}


def serve(folder: str, requests: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Answer requests together; a request has `prompt`, `images`, `new_tokens` and options `extra_args`."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.exceptions import VLLMValidationError

    engine = LLM(model=folder, **{**LIMITS, **options})
    rows: list[dict[str, Any]] = []
    for request in requests:
        images = [Image.open(Path(folder) / name) for name in request.get("images", ())]
        prompt = {"prompt": request["prompt"], "multi_modal_data": {"image": images} if images else {}}
        sampling = SamplingParams(
            temperature=0.0, max_tokens=request["new_tokens"], extra_args=request.get("extra_args"), logprobs=1
        )
        try:
            made = engine.generate([prompt], sampling, use_tqdm=False)[0]
        except VLLMValidationError as error:
            rows.append({"refused": str(error)})
            continue
        rows.append({"tokens": list(made.outputs[0].token_ids), "prompt_tokens": len(made.prompt_token_ids)})
    modules: set[str] = set()
    engine.apply_model(lambda model: modules.update(type(one).__module__ for one in model.modules()))
    found = {"class": engine.llm_engine.model_config.architecture, "modules": sorted(modules), "rows": rows}
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def ask_server(folder: str, requests: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Send requests of the OpenAI client to `vllm serve` at once; a request has `new_tokens`, `extra` and either.

    `prompt`, or `conversation` with `images`, whose answer is streamed if it has `stream`.
    """
    from concurrent.futures import ThreadPoolExecutor

    from openai import BadRequestError

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        extra = {"return_token_ids": True, **request["extra"]}
        common = {"model": "served", "temperature": 0.0, "extra_body": extra}
        try:
            if "prompt" in request:
                made = client.completions.create(prompt=request["prompt"], max_tokens=request["new_tokens"], **common)
                return {"tokens": made.choices[0].token_ids, "prompt_tokens": made.usage.prompt_tokens}
            messages = with_files(request["conversation"], [Path(folder) / name for name in request["images"]])
            if request["stream"]:
                tokens, _, prompt_tokens = stream(client, messages, request["new_tokens"], request["extra"])
                return {"tokens": tokens, "prompt_tokens": prompt_tokens}
            made = client.chat.completions.create(
                messages=messages, max_completion_tokens=request["new_tokens"], **common
            )
            return {"tokens": made.choices[0].token_ids, "prompt_tokens": made.usage.prompt_tokens}
        except BadRequestError as error:
            return {"refused": str(error)}

    with running_server(Path(folder), {**LIMITS, **options}) as client, ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, requests))


def match_router(config: dict[str, Any] | None) -> bool:
    """Whether vLLM takes a block of MoGE, or without options one of Qwen3's, for a plain choice of the K best."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    from vllm.model_executor.models.transformers.fusers.moe import MoEBlockFuser

    from vlparts.parts.configuration_moge import MoGEConfig
    from vlparts.parts.modeling_moge import MoGEBlock

    with torch.device("meta"):
        if config is None:
            sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
            block: torch.nn.Module = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes))
        else:
            block = MoGEBlock(MoGEConfig.from_preset("tiny", **config))
    return MoEBlockFuser.match(block, "experts") is not None


def shared_names() -> list[str]:
    """Class names of our models that vLLM has too."""
    from vllm import ModelRegistry

    from vlparts.registration import PARTS

    ours = {model.__name__ for part in PARTS for model in part.models.values()}
    return sorted(ours & set(ModelRegistry.get_supported_archs()))


def both_runners(extra_args: dict[str, Any], histories: list[list[int]], vocab_size: int) -> list[list[bool]]:
    """For each history whether the interfaces of both model runners give the scores of transformers' processor.

    The batches are made here, as vLLM describes them: a row for each history, every third without the option.
    """
    import numpy as np
    import torch
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    from vlparts.serving.request_options import ngram_processor
    from vlparts.serving.vllm_logits import WindowedNGrams

    asked = [
        SimpleNamespace(extra_args=extra_args if row % 3 else None, max_tokens=None) for row in range(len(histories))
    ]
    model = SimpleNamespace(generation_config="vllm", override_generation_config={})
    config = SimpleNamespace(speculative_config=None, model_config=model)
    scores = torch.randn(len(histories), vocab_size)
    wanted = scores.clone()
    for row, history in enumerate(histories):
        processor = ngram_processor(asked[row].extra_args)
        if processor is not None:
            wanted[row] = processor(torch.tensor([history], dtype=torch.int64), scores[row : row + 1])[0]

    first = WindowedNGrams(config, torch.device("cpu"), False)
    added = [(row, params, [1, 2, 3], histories[row]) for row, params in enumerate(asked)]
    first.update_state(BatchUpdate(batch_size=len(histories), removed=[], added=added, moved=[]))
    one = first.apply(scores.clone())

    prompt, longest = 3, max(map(len, histories))
    slots = torch.randperm(len(histories))
    tokens = torch.zeros(len(histories), prompt + longest, dtype=torch.int32)
    state = SimpleNamespace(
        all_token_ids=SimpleNamespace(gpu=tokens),
        prompt_len=SimpleNamespace(np=np.full(len(histories), prompt, dtype=np.int32)),
    )
    second = WindowedNGrams(config, state)
    for row, history in enumerate(histories):
        slot = int(slots[row])
        tokens[slot, prompt : prompt + len(history)] = torch.tensor(history, dtype=torch.int32)
        second.add_request(slot, SimpleNamespace(extra_args=extra_args, max_tokens=None))  # an earlier request
        assert second.add_request(slot, asked[row]) == bool(row % 3)
    lengths = np.array([prompt + len(history) for history in histories])
    context = SimpleNamespace(idx_mapping_np=slots.numpy(), seq_lens_upper_bound_np=lengths)
    two = second.apply(scores.clone(), context)
    return [[torch.equal(found[row], wanted[row]) for row in range(len(histories))] for found in (one, two)]


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), {}
    for name, (function, arguments) in jobs.items():
        try:
            results[name] = globals()[function](**arguments)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
