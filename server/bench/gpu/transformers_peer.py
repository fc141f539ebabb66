"""transformers' continuous batching on the same weights and prompts, in a process of its own.

    python -m server.bench.gpu.transformers_peer '{"shape": …, "device": …, "sequences": …, "new_tokens": …}'

Prints one line of JSON. The weights are ours, name by name. The same batch is answered twice by the same manager and
the second time counts: what it does once at its start is left out, as it is for us.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from server.bench.gpu.models import SHAPES, backbone, config_of, dtype_of
from server.bench.gpu.scene import drawn_lengths
from server.bench.gpu.trace import Trace
from server.models.decoder import Decoder

LANGUAGES = 64
TINY_BLOCKS = {"num_blocks": 64, "max_batch_tokens": 256}  # a CPU's memory is not its own


def main(job: dict[str, Any]) -> dict[str, Any]:
    device, config = torch.device(job["device"]), config_of(job["shape"])
    model = model_of(job["shape"], backbone(config, 64, device), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # its cache takes what is free
    lengths = drawn_lengths(job["sequences"], job["longest"])
    ids = Trace.stored().pieces(len(lengths), int(lengths.max()), config.vocab_size, languages=LANGUAGES, first=4099)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
    generated(model, prompts, job["new_tokens"], device)  # captures graphs, compiles, sizes its cache
    begun = time.perf_counter()
    answers = generated(model, prompts, job["new_tokens"], device)
    seconds = time.perf_counter() - begun
    tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    if len(answers) != len(prompts):
        raise RuntimeError(f"{len(answers)} of {len(prompts)} answers came back")
    made = [times for answer in answers.values() if (times := getattr(answer, "timestamps", None))]
    first, last = (float(np.min([t[0] for t in made])), float(np.max([t[-1] for t in made]))) if made else (0, 0)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_to_last_token_s": last - first,
        "attention": model.config._attn_implementation,
    }


def model_of(shape: str, ours: Decoder, device: torch.device) -> Any:
    """Their model with our weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    values = {k: v for k, v in SHAPES[shape].items() if k not in ("model_type", "architectures", "torch_dtype")}
    with torch.device("meta"):
        theirs: Any = Qwen3ForCausalLM(Qwen3Config(**values))
    theirs = theirs.to(dtype_of(ours.config, device)).to_empty(device=device).eval()
    theirs.tie_weights()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weight(ours, name, parameter.shape))
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(device)  # its buffers were on no device
    return theirs


def weight(ours: Decoder, name: str, shape: torch.Size) -> Tensor:
    """Our weight of their name. Heads are rotated in neighbouring pairs here, in halves there."""
    found = ours.slot(name)
    assert found is not None
    if ".q_norm." in name or ".k_norm." in name:
        found = found[0]  # one for all heads
    if any(part in name for part in (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm.")):
        width = ours.config.head_dim
        found = found.reshape(-1, width // 2, 2, *found.shape[1:]).transpose(1, 2)
    return found.reshape(shape)


def generated(model: nn.Module, prompts: list[list[int]], new_tokens: int, device: torch.device) -> dict[str, Any]:
    import transformers

    make: Any = transformers.GenerationConfig
    config = make(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    extra: dict[str, Any] = {}
    if device.type == "cpu":
        kind: Any = getattr(transformers, "ContinuousBatchingConfig", None)
        if kind is not None:
            extra["continuous_batching_config"] = kind(**TINY_BLOCKS)
    batch: Any = model
    answers: dict[str, Any] = batch.generate_batch(
        prompts,
        generation_config=config,
        record_timestamps=True,
        progress_bar=False,
        persistent_manager=True,
        **extra,
    )
    return answers


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
