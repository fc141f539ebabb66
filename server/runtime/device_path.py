"""The device path: decode steps that stay on a GPU, and what serves in their place where it cannot be taken.

    GPU new enough, Triton, kernels that run and agree with torch's ─► paged attention, fused kernels
                             a decode step that runs, memory included ─► DecodeSteps
                                                      room to capture ─► CUDA graphs
    otherwise                                                         ─► what does without, and one line says why

Chosen once, at start; named in the start-up report.
"""

from __future__ import annotations

import logging

import torch

from kernels import gated_product, language, rms_norm, rotary, sampling
from server.errors import CapacityError
from server.models.attention.base import AttentionBackend
from server.models.attention.kv_cache import KVCache
from server.models.attention.paged import PagedBackend
from server.models.attention.sdpa import SdpaBackend
from server.models.config import ModelConfig
from server.models.decoder import Decoder
from server.runtime.attention_probe import TOLERANCE, attention_error, choose_paged, first_line
from server.runtime.decode_step import DecodeSteps, DeviceMemory

logger = logging.getLogger(__name__)

CAPABILITY = (8, 0)  # bf16 in tensor cores


class DevicePath:
    """`dummy_block`: the block after those of the pool, which dummies use.

    `paged`: whether our kernels are used. `attention`: who attends, in words. `notes`: what is not as it could be, and
    why, one line each.
    """

    def __init__(self, dummy_block: int) -> None:
        self.dummy_block = dummy_block
        self.paged = False
        self.attention = "torch's scaled_dot_product_attention"
        self.notes: list[str] = []
        self.steps: DecodeSteps | None = None

    def choose_attention(self, config: ModelConfig, cache: KVCache) -> AttentionBackend:
        """Paged attention, unless something speaks against our kernels; ours or torch's, whichever is faster."""
        layer = cache.layers[0]
        reason = unfit(layer.device) or trial(config, layer.dtype, layer.device)
        self.paged = reason is None
        if self.paged:
            attention, self.attention = choose_paged(config, cache)
            return attention
        self.note(f"torch's operators in place of our kernels: {reason}")
        return SdpaBackend(config, cache)

    def build(
        self,
        model: Decoder,
        attention: AttentionBackend,
        memory: DeviceMemory | None,
        *,
        max_num_seqs: int,
        max_len: int,
        block_size: int,
        window: int,
        graphs: bool,
    ) -> DecodeSteps | None:
        """Decode steps, captured if `graphs`; None where there is no paged attention, or where one fails."""
        if not isinstance(attention, PagedBackend):
            return None
        if not model.without_up <= (memory.up_layers if memory is not None else frozenset()):
            self.note("decode steps run eagerly: they cannot read the memory that stands in for up-projections")
            return None
        device = attention.device
        try:
            steps = DecodeSteps(
                model,
                attention,
                memory,
                max_num_seqs=max_num_seqs,
                max_len=max_len,
                block_size=block_size,
                window=window,
                device=device,
                dummy_block=self.dummy_block,
                graphs=graphs and device.type == "cuda",
            )
        except torch.cuda.OutOfMemoryError:
            needed = 4 * max_num_seqs * model.config.vocab_size
            self.note(
                f"decode steps run eagerly: their logits take {needed} bytes, which are not free on {device}; set "
                f"--max-num-seqs {max(max_num_seqs // 2, 1)} or lower --kv-bytes"
            )
            return None
        if not self._warms_up(steps):
            return None
        self._capture(steps)
        self.steps = steps
        return steps

    def _warms_up(self, steps: DecodeSteps) -> bool:
        """Whether a decode step runs. A kernel of a memory that fails in every step fails here, and in no answer."""
        try:
            steps.warm_up()
        except torch.cuda.OutOfMemoryError:
            self.note(
                f"decode steps run eagerly: one of {steps.most} sequences does not fit into what is free on "
                f"{steps.device}; set --max-num-seqs {max(steps.most // 2, 1)} or lower --kv-bytes"
            )
            return False
        except Exception as error:
            logger.exception("a decode step on the device failed")
            self.note(f"decode steps run eagerly, since one on the device failed: {first_line(error)}")
            return False
        return True

    def _capture(self, steps: DecodeSteps) -> None:
        """Steps that cannot be captured run as they are."""
        try:
            steps.capture()
        except CapacityError as error:
            self.note(f"decode steps run without CUDA graphs: {error}")
        except Exception as error:
            logger.exception("decode steps could not be captured")
            steps.give_up_graphs()
            self.note(f"decode steps run without CUDA graphs, since capturing failed: {first_line(error)}")

    def serve_fetches(self, memory: DeviceMemory) -> None:
        """Has the device read prefills' rows where they lie in RAM; else a note says why the host gathers them."""
        try:
            memory.serve_fetches()
        except Exception as error:
            logger.debug("rows could not be read in place", exc_info=True)
            self.note(
                f"the host gathers the rows of prefills, since the device could not read one: {first_line(error)}"
            )

    def report(self) -> list[tuple[str, str]]:
        """Lines of the start-up report."""
        lines = [("attention", self.attention)]
        steps = self.steps
        if steps is not None:
            how = "without CUDA graphs"
            if steps.captured:
                parts = len(steps.captured[steps.most].parts)
                cut = f", each in {parts} parts for rows that the host brings" if parts > 1 else ""
                how = (
                    f"{len(steps.captured)} CUDA graphs of {', '.join(map(str, steps.buckets))} sequences{cut}, "
                    f"captured in {steps.capture_seconds:.1f} s, {steps.capture_bytes:,} bytes"
                )
            lines.append(("decode", f"on the device, one step ahead, {how}"))
        return lines + [("fallback", note) for note in self.notes]

    def note(self, note: str) -> None:
        """For the log and the start-up report."""
        logger.warning(note)
        self.notes.append(note)


def unfit(device: torch.device) -> str | None:
    """Why our kernels cannot run on this device; None if they can. On a CPU they run by their references."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {found[0]}.{found[1]} and they need {CAPABILITY[0]}.{CAPABILITY[1]}"
    if not language.available:
        return "Triton is not installed; pip install 'engram-server[gpu]'"
    return None


@torch.inference_mode()
def trial(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Runs every kernel of a decode step once, in this model's shapes; why they cannot be used, None if they can."""
    try:
        worst = attention_error(config, dtype, device)
        dense_kernels(config, dtype, device)
    except Exception as error:
        logger.debug("the kernels' trial failed", exc_info=True)
        return f"a kernel failed: {first_line(error)}"
    if not worst <= TOLERANCE[dtype]:  # NaN included
        return f"paged attention differs by {worst:.2g} from torch's, {TOLERANCE[dtype]} at most is allowed"
    return None


def dense_kernels(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles and runs the other kernels of a decode step. Raises what they raise."""
    heads, half = config.num_heads + config.num_kv_heads, config.head_dim // 2
    ones = torch.ones(2, config.hidden_size, device=device)
    rms_norm.add_rms_norm(ones, ones.to(dtype), ones[0], config.rms_norm_eps, dtype)
    turned = torch.ones(2, heads, config.head_dim, dtype=dtype, device=device)
    gain = torch.ones(heads, config.head_dim, device=device) if config.features.qk_norm else None
    positions = torch.zeros(2, dtype=torch.int64, device=device)
    table = torch.ones(1, half, dtype=torch.complex64, device=device)
    rotary.rotate_(turned, table, positions, gain, config.rms_norm_eps)
    gate_up = torch.ones(2, 2 * config.intermediate_size, dtype=dtype, device=device)
    gated_product.gated_product(gate_up, config.features.activation)
    logits = torch.zeros(2, config.vocab_size, device=device)
    sampling.sample(logits, ones[:, 0], positions, positions)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
