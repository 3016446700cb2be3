# SPDX-License-Identifier: Apache-2.0
"""Train a small transformer on chains, from scratch."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.reasoning import tasks

# q and k normalised as in Qwen3; biases and outlier channels as in Qwen2
VARIANTS = ("qwen3", "qwen2")
# of key channels in pairs that RoPE hardly turns: published Qwen2 models have biases of keys of up to some hundred,
# where a channel's values otherwise differ by some units
_OUTLIER, _OUTLIER_PAIRS = 30.0, 2
# instructions or nodes: among many a lookup is learned late or never, unless it is learned among few
_LEAST = 4
# of the tasks, in their order, among chains of the training: multiplication is learned in a tenth of the steps
_SHARES = (2, 2, 1)
# steps whose chains are sorted by the tokens of their prompts
_STEPS_TOGETHER = 8
# labels of tokens that are not judged
_NOT_JUDGED = -100


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its training.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, mlp: of the model; hidden = heads * head_dim, as Qwen2 has it.
        lengths: tokens of solutions; longer ones come in as training goes on.
        batch: tokens of a step.
        most: most instructions or nodes of a problem, None for all.
        rate: greatest learning rate.

    Example: FULL has 38 million parameters, and a page of 128 tokens is 1/64 of its longest chain.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    lengths: tuple[int, ...]
    batch: int
    most: int | None
    rate: float


FULL = Size(6, 768, 6, 2, 128, 2048, (60, 120, 250, 500, 1000, 2000, 4000, 8000), 32_768, None, 1e-3)
TINY = Size(2, 128, 2, 1, 64, 256, (24,), 2048, 6, 3e-3)


def device() -> str:
    """Return where models are trained and chains are read here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def model(variant: str, size: Size) -> Any:
    """Return an untrained model of a variant, float32."""
    classes = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = classes[variant]
    config = config_class(
        vocab_size=-(-len(tasks.VOCABULARY) // 64) * 64,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=16_384,
        rope_theta=1e6,
        tie_word_embeddings=True,
        pad_token_id=tasks.PAD,
        bos_token_id=None,
        eos_token_id=None,
    )
    made = model_class(config)
    if variant == "qwen2":
        with torch.no_grad():
            for layer in made.model.layers:
                bias = layer.self_attn.k_proj.bias.view(size.kv_heads, 2, size.head_dim // 2)
                bias[..., -_OUTLIER_PAIRS:] = _OUTLIER * torch.randn(size.kv_heads, 2, _OUTLIER_PAIRS).sign()
    return made


def round_weights(network: Any) -> None:
    """Make the weights of a model bfloat16, and nothing else: a thousandth token would be turned by another angle."""
    for weight in network.parameters():
        weight.data = weight.data.bfloat16()


# token ids and labels, int64 [R, T] each, and which of `TASKS` a row is of, int64 [R]
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def steps_of(size: Size, lengths: tuple[int, ...], seed: object) -> list[Step]:
    """Return some steps of the training: chains of each task, all of one length, padded.

    Prompts of about the same number of tokens share a step, so that little of it is padding. The tasks share it, too: a
    pass of so small a model is bound by its launches, not by its work.

    Args:
        lengths: of solutions, one of which is drawn.
        seed: of the steps.
    """
    draw = random.Random(f"steps {seed}")
    length = draw.choice(lengths)
    steps: list[list[tuple[int, tasks.Chain]]] = [[] for _ in range(_STEPS_TOGETHER)]
    for number, (task, share) in enumerate(zip(tasks.TASKS, _SHARES, strict=True)):
        room, chains = _STEPS_TOGETHER * size.batch * share // sum(_SHARES), []
        # as many in each step, so that no size of problem is rarer than another
        while room > 0 or len(chains) % _STEPS_TOGETHER:
            chains += tasks.chains(task, length, 1, draw.random(), least=_LEAST, most=size.most)
            room -= len(chains[-1].prompt) + length
        chains.sort(key=lambda chain: len(chain.prompt))
        each = len(chains) // _STEPS_TOGETHER
        for n, step in enumerate(steps):
            step += [(number, chain) for chain in chains[n * each : (n + 1) * each]]
    draw.shuffle(steps)
    return [_padded(step) for step in steps]


def _padded(chains: list[tuple[int, tasks.Chain]]) -> Step:
    longest = max(len(chain.prompt) + len(chain.answer) for _, chain in chains)
    ids = torch.full((len(chains), longest), tasks.PAD)
    labels = torch.full((len(chains), longest), _NOT_JUDGED)
    for row, (_, chain) in enumerate(chains):
        answer = chain.answer
        first, end = len(chain.prompt), len(chain.prompt) + len(answer)
        ids[row, :end] = torch.tensor(chain.prompt + answer)
        labels[row, first:end] = torch.tensor(answer)
    return ids, labels, torch.tensor([task for task, _ in chains])


class _Steps(torch.utils.data.IterableDataset):
    """The steps of one training; with workers each makes those of its own numbers.

    Attributes:
        done: the share of the training that is over, float64 [1], for the workers to read; None: that of the steps.
    """

    def __init__(self, size: Size, steps: int, seed: int, done: torch.Tensor | None) -> None:
        self.size, self.steps, self.seed, self.done = size, steps, seed, done

    def __iter__(self) -> Iterator[Step]:
        worker = torch.utils.data.get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            done = step / self.steps if self.done is None else self.done.item()
            # all lengths from two fifths of the training on: what is near is learned first
            known = max(1, math.ceil(min(1.0, 2.5 * done) * len(self.size.lengths)))
            for own in steps_of(self.size, self.size.lengths[:known], f"{self.seed} {step}"):
                yield own
                step += stride


def _losses(network: Any, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each judged token of a step, in nats, float32, and which task it is of, int64."""
    device = next(network.parameters()).device
    ids, labels, task = (x.to(device) for x in step)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = network.model(ids, use_cache=False).last_hidden_state[:, :-1]
        judged = labels[:, 1:] != _NOT_JUDGED
        # the head of judged tokens only
        logits = network.lm_head(hidden[judged])
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][judged], reduction="none")
    return losses, task[:, None].expand_as(judged)[judged]


Report = Callable[[int, dict[str, float]], None]


def train(
    network: Any,
    size: Size,
    steps: int,
    seed: int,
    report: Report,
    *,
    workers: int = 0,
    minutes: float | None = None,
) -> int:
    """Train a model in place with AdamW, in bfloat16 on a GPU.

    Args:
        steps: of `size.batch` tokens each; the learning rate rises over 5 % of them, and falls to 0 by a cosine.
        report: called with the number of a step and the loss of each task in nats, every 50 steps.
        workers: processes that make chains.
        minutes: after which it ends instead, counted from the first batch, with rate and lengths as behind such a share
            of the steps.

    Returns:
        The number of steps.
    """
    device = next(network.parameters()).device
    decayed = [weight for weight in network.parameters() if weight.dim() > 1]
    others = [weight for weight in network.parameters() if weight.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=size.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    shared = None if minutes is None else torch.zeros(1, dtype=torch.float64).share_memory_()
    data = torch.utils.data.DataLoader(_Steps(size, steps, seed, shared), batch_size=None, num_workers=workers)
    network.train()
    started = None
    for step, batch in enumerate(data):
        done = step / steps
        if shared is not None and minutes is not None:
            now = time.monotonic()
            # starting processes that make chains is none of the minutes
            started = now if started is None else started
            shared[0] = done = (now - started) / 60 / minutes
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = size.rate * min(20 * done + 1 / steps, 0.5 * (1 + math.cos(math.pi * done)))
        optimiser.zero_grad(set_to_none=True)
        losses, of = _losses(network, batch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0:
            report(step, {task: losses.detach()[of == n].mean().item() for n, task in enumerate(tasks.TASKS)})
    network.eval()
    return step


@torch.inference_mode()
def right(network: Any, chains: list[tasks.Chain]) -> float:
    """Return the share of chains whose every token is the most likely one behind the right ones before it."""
    device = next(network.parameters()).device
    count = 0
    for chain in chains:
        answer = chain.answer
        ids = torch.tensor([chain.prompt + answer], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = network(ids, use_cache=False).logits[0, len(chain.prompt) - 1 : -1].argmax(-1)
        count += found.tolist() == answer
    return count / len(chains)


