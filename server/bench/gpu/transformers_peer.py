"""transformers' continuous batching on the same weights and prompts, in a process of its own.

    python -m server.bench.gpu.transformers_peer '{"shape": …, "device": …, "sequences": …, "new_tokens": …}'

Prints one line of JSON. The weights are ours, name by name. The same manager answers other prompts of these lengths
first: what it does once at its start is left out, as it is for us, and the blocks it keeps for shared prefixes hold no
prompt of ours. Without flash attention it attends under a dense mask, all queries of a step to all keys of a step: then
it takes so many requests at once that this costs it little.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from server.batch import Ints
from server.bench.gpu.models import SHAPES, backbone, config_of, dtype_of
from server.bench.gpu.scene import drawn_lengths
from server.bench.gpu.trace import Trace
from server.models.decoder import Decoder

LANGUAGES = 64
MASKED_AT_ONCE = 64  # requests; a mask costs the square of them
TINY_BLOCKS = {"num_blocks": 64, "max_batch_tokens": 256}  # a CPU's memory is not its own


def main(job: dict[str, Any]) -> dict[str, Any]:
    device, config = torch.device(job["device"]), config_of(job["shape"])
    model = model_of(job["shape"], backbone(config, 64, device), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # its cache takes what is free
    peer = Peer(model, job["new_tokens"], device)
    lengths = drawn_lengths(job["sequences"], job["longest"])
    peer.answers(prompts(lengths, config.vocab_size, first=8209)[: peer.at_once])  # captures, compiles, sizes its cache
    asked = prompts(lengths, config.vocab_size, first=4099)
    begun = time.perf_counter()
    answers = peer.answers(asked)
    seconds = max(answer.timestamps[-1] for answer in answers) - begun  # ending its thread is no part of it
    tokens = sum(len(answer.generated_tokens) for answer in answers)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "attention": peer.attention,
        "at_once": min(peer.at_once or len(asked), len(asked)),
    }


def prompts(lengths: Ints, vocab: int, first: int) -> list[list[int]]:
    """Of the text from `first` on, as `streams.prompts_of`."""
    ids = Trace.stored().pieces(len(lengths), int(lengths.max()), vocab, languages=LANGUAGES, first=first)
    return [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]


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


class Peer:
    """`generate_batch` by one manager. `attention`: what transformers takes of what is installed; `at_once`: the most
    requests of a step, None: as many as it takes itself."""

    def __init__(self, model: Any, new_tokens: int, device: torch.device) -> None:
        import transformers

        make: Any = transformers.GenerationConfig
        self.model, self.new_tokens = model, new_tokens
        self.config = make(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        model.init_continuous_batching(generation_config=self.config)  # a manager switches to the best attention
        self.attention: str = model.config._attn_implementation
        self.at_once = None if "flash" in self.attention else MASKED_AT_ONCE
        blocks: dict[str, Any] = TINY_BLOCKS if device.type == "cpu" else {}
        batching: Any = transformers.ContinuousBatchingConfig
        self.batching = batching(max_requests_per_batch=self.at_once, **blocks)
        if device.type == "cpu":
            endless(device)

    def answers(self, prompts: list[list[int]]) -> list[Any]:
        """Raises RuntimeError with the first request's words where one is not answered to its end."""
        found: dict[str, Any] = self.model.generate_batch(
            prompts,
            generation_config=self.config,
            continuous_batching_config=self.batching,
            record_timestamps=True,
            progress_bar=False,
            persistent_manager=True,
        )
        failed = [answer.error for answer in found.values() if answer.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(prompts)} requests failed: {failed[0]}")
        ended = sum(len(answer.generated_tokens) == self.new_tokens for answer in found.values())
        if ended != len(prompts):
            raise RuntimeError(f"{ended} of {len(prompts)} requests were answered to their end")
        return list(found.values())


def endless(device: torch.device) -> None:
    """transformers asks psutil, which may be missing, how much memory a CPU has, and takes 0 for an answer."""
    from transformers.generation.continuous_batching import cache

    cache.get_device_and_memory_breakdown = lambda: (device, 1 << 40, 0, 0)  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
