"""Contenders that are a model and nothing else: ``transformers.generate``, and the floor.

The floor is the matrix work of a PPO iteration in the least time that we know of: T tokens of all rows from a cached
model, one teacher-forced forward each of the reference and the reward model, and for each optimizer step one forward
and one backward with logits at completion positions only, gradient clipping and a fused Adam. Nothing is sampled, no
text is decoded, and what is trained on is random; but tokens and positions are exactly those that PPO trains on. In the
ragged work all completions have the mean length, so that nothing is padding. On a CPU memory that is freed is kept, as
textgym's agents keep it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from measures import Clock
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, StaticCache
from workload import EOS, GROUP, PAD, Workload, language_model, prompt_ids, real_tokens, scalar_model

from textgym.engine.freed_memory import keep_freed_memory

# On a CPU the backward of torch's bf16 flash attention takes longer, up to about there, than plain matrix products.
SHORT_CONTEXT = 512  # tokens


class Generate:
    """Sampling with ``transformers``, each row until its end-of-sequence token in the ragged work.

    :param dtype: of the weights; default that of the workload
    """

    covers = ("rollout",)

    def __init__(self, workload: Workload, dtype: str | None = None) -> None:
        self.workload = workload
        self.model = language_model(workload).to(workload.device, getattr(torch, dtype or workload.dtype))
        self.prompts = torch.tensor(prompt_ids(workload, workload.rows), device=workload.device)
        self.sampling = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=workload.new_tokens,
            eos_token_id=EOS if workload.ragged else None,
            pad_token_id=PAD,
        )
        if not workload.ragged:
            self.model.generation_config.eos_token_id = None

    def iterate(self, clock: Clock) -> dict[str, Any]:
        with torch.inference_mode():
            mask = torch.ones_like(self.prompts)
            out = self.model.generate(self.prompts, attention_mask=mask, generation_config=self.sampling)
        clock.lap("rollout")
        completions = out[:, self.workload.prompt_tokens :]
        return {"tokens": real_tokens(completions) if self.workload.ragged else completions.numel()}


class Floor:
    """The matrix work of an iteration.

    :param precision: ``float32``; or ``bfloat16``: weights of the decode, the reference and the reward model in bf16,
        and the update under autocast with fp32 weights
    """

    covers = ("rollout", "score", "update")

    def __init__(self, workload: Workload, precision: str) -> None:
        self.workload, self.precision = workload, getattr(torch, precision)
        if workload.device == "cpu":
            keep_freed_memory()
        device, frozen = workload.device, {"device": workload.device, "dtype": self.precision}
        self.policy = language_model(workload).to(device)
        self.low = precision != "float32"
        self.decoder = copy.deepcopy(self.policy).to(**frozen) if self.low else self.policy
        self.reference = language_model(workload).to(**frozen)
        self.reward = scalar_model(workload).to(**frozen)
        if self.low and device == "cpu" and workload.prompt_tokens + workload.new_tokens <= SHORT_CONTEXT:
            self.policy.set_attn_implementation("eager")
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=workload.lr, eps=1e-5, fused=True)

        # Episodes of one length, as many as make all steps of all rows.
        self.length = workload.mean_tokens
        self.waves = max(1, round(workload.rollout_steps / self.length))  # episodes of a row
        count = self.waves * workload.rows
        generator = torch.Generator().manual_seed(0)
        prompts = torch.tensor(prompt_ids(workload, count))
        completions = torch.randint(4, workload.vocab, (count, self.length), generator=generator)
        self.ids = torch.cat([prompts, completions], 1).to(device)  # (E, P + L)
        self.advantages = torch.randn(completions.shape, generator=generator).to(device)  # (E, L)
        self.decode = compiled_decode if workload.compile else decode
        self.trained_tokens = 0  # in all iterations

    def iterate(self, clock: Clock) -> dict[str, Any]:
        with torch.inference_mode():
            if self.low:
                for low, weight in zip(self.decoder.parameters(), self.policy.parameters(), strict=True):
                    low.copy_(weight)
            for wave in self.ids.split(self.workload.rows):
                self.decode(self.decoder, wave, self.workload.prompt_tokens)
            clock.lap("rollout")
            self.score()
            clock.lap("score")
        before = self.trained_tokens
        self.update()
        clock.lap("update")
        return {"tokens": self.ids.shape[0] * self.length, "trained_tokens": self.trained_tokens - before}

    def score(self) -> None:
        """Log-probabilities of all tokens from the reference, and the reward model's output at all positions."""
        prompt = self.workload.prompt_tokens
        for wave in self.ids.split(self.workload.rows):
            hidden = self.reference.model(input_ids=wave[:, :-1], use_cache=False).last_hidden_state
            token_losses(self.reference.lm_head(hidden[:, prompt - 1 :]), wave[:, prompt:])
            self.reward.score(self.reward.model(input_ids=wave, use_cache=False).last_hidden_state)

    def update(self) -> None:
        """Epochs × minibatches × (forward, backward, clipping, Adam)."""
        prompt, device = self.workload.prompt_tokens, self.ids.device
        share = len(self.ids) // self.workload.minibatches  # episodes
        for _ in range(self.workload.epochs):
            for chosen in torch.randperm(len(self.ids)).to(device).split(share):
                ids, advantages = self.ids[chosen], self.advantages[chosen]  # (b, P + L), (b, L)
                with torch.autocast(device.type, self.precision, enabled=self.low):
                    # The last token is predicted, never read.
                    hidden = self.policy.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
                    logits = self.policy.lm_head(hidden[:, prompt - 1 :])  # (b, L, V)
                    losses = token_losses(logits, ids[:, prompt:])
                self.optimizer.zero_grad()
                (losses * advantages.flatten()).mean().backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                self.optimizer.step()
                self.trained_tokens += len(losses)


class GroupFloor(Floor):
    """The matrix work of an iteration with groups of completions: each prompt is read once in every pass.

    A teacher-forced pass has a row for each group, the prompt and the completions after it, with a mask.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, "float32")
        prompt, new, group = workload.prompt_tokens, self.length, math.gcd(GROUP, workload.rows)
        count = len(self.ids) // group  # G
        self.group = group
        prompts = self.ids[::group, :prompt]  # (G, P)
        self.ids[:, :prompt] = prompts.repeat_interleave(group, 0)
        completions = self.ids[:, prompt:].unflatten(0, (count, group))  # (G, K, T)
        self.targets = completions.flatten(1)  # (G, KT)
        # The last token of a completion is predicted, never read.
        self.rows = torch.cat([prompts, completions[:, :, :-1].flatten(1)], 1)  # (G, W)
        own = torch.arange(group, device=self.ids.device).repeat_interleave(new - 1)
        owners = torch.cat([own.new_full((prompt,), -1), own])  # (W,)
        after = prompt + torch.arange(new - 1, device=self.ids.device)
        self.positions = torch.cat([torch.arange(prompt, device=self.ids.device), after.repeat(group)])  # (W,)
        visible = (self.positions <= self.positions[:, None]) & ((owners == owners[:, None]) | (owners < 0))
        self.visible = visible[None, None]
        # From where each token is predicted: the first of a completion from the prompt's end.
        begins = torch.full((group, 1), prompt - 1, device=self.ids.device)
        places = torch.arange(prompt, len(owners), device=self.ids.device).view(group, new - 1)
        self.places = torch.cat([begins, places], 1).flatten()  # (KT,)
        self.advantages = self.advantages.reshape(count, -1)
        self.decode = functools.partial(decode, group=group)

    def read(self, trunk: Any, rows: Tensor) -> Tensor:
        """Hidden states ``(g, W, H)`` of some groups."""
        mask = self.visible.expand(len(rows), -1, -1, -1)
        positions = self.positions.expand(len(rows), -1)
        return trunk(input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state

    def score(self) -> None:
        """See :class:`Floor`."""
        hidden = self.read(self.reference.model, self.rows)
        token_losses(self.reference.lm_head(hidden[:, self.places]), self.targets)
        self.reward.score(self.read(self.reward.model, self.rows))

    def update(self) -> None:
        """See :class:`Floor`."""
        share = max(1, len(self.rows) // self.workload.minibatches)
        for _ in range(self.workload.epochs):
            for chosen in torch.randperm(len(self.rows)).to(self.ids.device).split(share):
                hidden = self.read(self.policy.model, self.rows[chosen])
                losses = token_losses(self.policy.lm_head(hidden[:, self.places]), self.targets[chosen])
                self.optimizer.zero_grad()
                (losses * self.advantages[chosen].flatten()).mean().backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                self.optimizer.step()
                self.trained_tokens += len(losses)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-probabilities ``(B * T,)`` of tokens ``(B, T)`` under logits ``(B, T, V)``."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")


def decode(model: Any, ids: Tensor, prompt_tokens: int, group: int = 1) -> None:
    """Logits of every completion token: the prompts in one forward, then a token of all rows at a time.

    :param ids: ``(B, P + T)``, prompts and what follows them
    :param group: how many rows in succession have the same prompt, which is read once
    """
    cache = DynamicCache(config=model.config)
    new, rows = slice(0, prompt_tokens), ids[::group]
    for end in range(prompt_tokens, ids.shape[1]):
        positions = torch.arange(new.start, end, device=ids.device).expand(len(rows), -1)
        output = model.model(
            input_ids=rows[:, new], position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        model.lm_head(output[:, -1])  # (B, V)
        if new.start == 0 and group > 1:
            cache.batch_repeat_interleave(group)
        new, rows = slice(end, end + 1), ids


def compiled_decode(model: Any, ids: Tensor, prompt_tokens: int) -> None:
    """The same with a compiled step, over a cache of fixed size: shapes that never change are what it needs."""
    step, cache, visible = _compiled_step(model, len(ids), ids.shape[1])
    cache.reset()
    new = slice(0, prompt_tokens)
    for end in range(prompt_tokens, ids.shape[1]):
        positions = torch.arange(new.start, end, device=ids.device).expand(len(ids), -1)
        # The prompts have a shape of their own, and come once.
        run = logits_behind if new.start == 0 else step
        run(model, ids[:, new].clone(), visible[new].expand(len(ids), 1, -1, -1), positions.clone(), cache)
        new = slice(end, end + 1)


def logits_behind(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
    """Logits ``(B, V)`` behind the last of ``(B, T)`` new tokens."""
    output = model.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return model.lm_head(output.last_hidden_state[:, -1])


@functools.cache
def _compiled_step(model: Any, rows: int, context: int) -> tuple[Callable[..., Tensor], StaticCache, Tensor]:
    """The step, its cache, and which places each place may attend to, ``(P + T, P + T)`` bool."""
    mode = "reduce-overhead" if model.device.type == "cuda" else None  # CUDA graphs
    step = torch.compile(logits_behind, dynamic=False, mode=mode)
    visible = torch.ones(context, context, dtype=torch.bool, device=model.device).tril()
    return step, StaticCache(config=model.config, max_cache_len=context), visible


CONTENDERS: dict[str, Callable[[Workload], Any]] = {
    "generate": Generate,
    "generate-bf16": functools.partial(Generate, dtype="bfloat16"),
    "floor-fp32": functools.partial(Floor, precision="float32"),
    "floor-bf16": functools.partial(Floor, precision="bfloat16"),
    "floor-groups": GroupFloor,
}
