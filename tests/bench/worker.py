"""One measurement in a process of its own: `python worker.py CASE VARIANT`, a JSON object on the last line.

VARIANT is `ours` or `tuned` (plain TRL without checkpointing; SFT grouped by length), followed by a dtype, `float32`
or `bf16` (autocast), and for `tuned` perhaps by `in parts`: four batches a step instead of one. Or it is `default`:
TRL's own settings but for batch and steps. In evaluation what follows `tuned` is the number of sentences a batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time

import datasets
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback, set_seed

from sftrl_utils import corpora, evaluation, models, training
from sftrl_utils.config import RunConfig
from sftrl_utils.prefix_sharing import PrefixSharingGRPOTrainer, PrefixSharingSFTTrainer, common_prefix

PROMPTS_PER_STEP = 4
ANSWER = 2  # tokens of an answer: the word and EOS


def load(name: str, dtype: torch.dtype = torch.float32):
    """Model of this shape and the tokenizer of the embedded one, whose tokens are within every vocabulary."""
    model, tokenizer = models.load("embedded")
    torch.manual_seed(0)
    if name == "smollm2":  # SmolLM2-135M's published configuration, random weights
        shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
        shape |= dict(num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, rope_theta=100_000.0)
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    elif name == "qwen3":  # Qwen3-0.6B's published configuration, random weights
        shape = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)
        shape |= dict(num_key_value_heads=8, head_dim=128, vocab_size=151_936, max_position_embeddings=40_960)
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(dtype).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


class Clock(TrainerCallback):
    """Seconds of each step from its batch to its gradient; the optimiser's are the same for every trainer."""

    def __init__(self, profiled: bool):
        self.steps = []
        self.profiler = torch.profiler.profile() if profiled else None  # of the last step

    def on_step_begin(self, args, state, control, **kwargs):
        synchronise()
        if self.profiler and state.global_step == state.max_steps - 1:
            self.profiler.start()
        self._start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        synchronise()
        self.steps.append(time.perf_counter() - self._start)
        if self.profiler and state.global_step == state.max_steps - 1:
            self.profiler.stop()

    def profile(self, kinds: int = 6) -> dict[str, float] | None:
        """Shares of the last step's time that the costliest kinds of operation took themselves."""
        if not self.profiler:
            return None
        field = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        times = {event.key: getattr(event, field) for event in self.profiler.key_averages()}
        costliest = sorted(times, key=times.get, reverse=True)[:kinds]
        return {name: times[name] / sum(times.values()) for name in costliest}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    """The GPU's name, or the number of threads and whether the CPU has units for bfloat16 matrices."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    amx = ", AMX" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    return f"{torch.get_num_threads()} CPU threads{amx}"


def peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def settings_of(variant: str, settings):
    """The project's `settings` in the variant's dtype, or TRL's defaults but for what both sides have in common."""
    if variant != "default":
        changes = {"bf16": "bf16" in variant, "use_cpu": not torch.cuda.is_available()}
        if "in parts" in variant:
            rows = settings.per_device_train_batch_size // 4
            changes |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4}
            changes |= {"steps_per_generation": 4} if hasattr(settings, "steps_per_generation") else {}
        if hasattr(settings, "generation_batch_size"):  # derived from the batch: TRL refuses it given as well
            changes["generation_batch_size"] = None
        return dataclasses.replace(settings, **changes)
    common = ("output_dir", "seed", "max_steps", "per_device_train_batch_size", "report_to", "disable_tqdm")
    common += ("save_strategy", "logging_steps", "learning_rate", "gradient_accumulation_steps", "max_length")
    common += ("num_generations", "max_completion_length", "steps_per_generation", "scale_rewards", "loss_type")
    kept = {name: getattr(settings, name) for name in common if hasattr(settings, name)}
    return type(settings)(**kept, use_cpu=not torch.cuda.is_available())  # bf16, TRL's default, asks for it there


def train(trainer, profiled: bool) -> dict:
    """Median seconds of a step: the first one warms up; the last one, where it is profiled, does not count."""
    clock = Clock(profiled)
    trainer.add_callback(clock)
    trainer.train()
    assert len(clock.steps) == trainer.args.max_steps
    return {"seconds": statistics.median(clock.steps[1 : -1 if profiled else None]), "profile": clock.profile()}


def prompts_of(tokenizer, length: int, count: int) -> list[str]:
    """Distinct prompts of exactly `length` tokens, without a common beginning."""
    words = [word for word in (tokenizer.decode([i]) for i in range(len(tokenizer)))
             if re.fullmatch(r" [a-z]{2,}", word) and len(tokenizer(word * 2)["input_ids"]) == 2]  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (count, length), generator=rng).tolist()
    prompts = ["".join(words[i] for i in row) for row in drawn]
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {length}
    return prompts


def grpo(variant: str, name: str, length: int, group_size: int, steps: int) -> dict:
    model, tokenizer = load(name)
    ours = variant.startswith("ours")  # and profiled, in one step more
    config = RunConfig.from_parameters(
        {"rl_steps": steps + ours, "batch_size": PROMPTS_PER_STEP * group_size, "group_size": group_size}
    )
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(variant, training.grpo_config(config, 0, scratch, ANSWER))
        set_seed(0)

        def reward(completion_ids, **_):
            return [float(sum(ids) % 2) for ids in completion_ids]

        data = datasets.Dataset.from_dict({"prompt": prompts_of(tokenizer, length, 4 * PROMPTS_PER_STEP)})
        trainer = PrefixSharingGRPOTrainer(
            model,
            reward,
            settings,
            train_dataset=data,
            processing_class=tokenizer,
            shared_prefix=ours,
        )
        measured = train(trainer, ours)
    rows = PROMPTS_PER_STEP * group_size
    # Forward passes count 1, backward passes 2. Sampling, then scoring with its gradient; what is needed at least
    # encodes a prompt once for both, and projects a prompt's last token and all but the last of a completion.
    plain = rows * (length + ANSWER - 1) + 3 * rows * (length + ANSWER)
    needed = 3 * PROMPTS_PER_STEP * length + 4 * rows * (ANSWER - 1)
    projected = 3 * PROMPTS_PER_STEP + 4 * rows * (ANSWER - 1)
    flops = 2 * (body(model) * needed + model.lm_head.weight.numel() * projected)
    return measured | {
        "floor": plain / needed,
        "tokens": rows * (length + ANSWER),
        "flops": flops,
    }


def sft(variant: str, name: str, batch_size: int, steps: int) -> dict:
    model, tokenizer = load(name)
    ours = variant.startswith("ours")
    config = RunConfig.from_parameters({"sft_steps": steps + ours, "batch_size": batch_size})
    corpus = corpora.load_corpus(config)
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(variant, training.sft_config(config, 0, scratch))
        set_seed(0)
        data = corpora.sft_dataset(tokenizer, corpus.splits["train"], "label")
        trainer = PrefixSharingSFTTrainer(
            model, settings, train_dataset=data, processing_class=tokenizer, shared_prefix=ours
        )
        measured = train(trainer, ours)
    texts = [p + c for p, c in zip(data["prompt"], data["completion"], strict=True)]
    mean = statistics.mean(len(ids) for ids in tokenizer(texts)["input_ids"])
    ids = [torch.tensor(row) for row in tokenizer(list(data["prompt"]))["input_ids"]]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    shared = common_prefix(padded, padded >= 0)
    needed = shared + batch_size * (mean - shared)
    return measured | {
        "floor": batch_size * mean / needed,
        "tokens": batch_size * mean,
        "flops": 6 * (body(model) * needed + model.lm_head.weight.numel() * batch_size * ANSWER),
    }


def evaluate(variant: str, name: str, sentences: int, every_metric: bool) -> dict:
    """Answers to a split, ours by scoring the closed set, plain by `generate`: one sampled answer a sentence.

    `every_metric`: the plain one also decodes greedily (accuracy, MCC) and computes the SFT loss of the labels, which
    ours reads off the same scores. Its sentences are sorted by length too.
    """
    model, tokenizer = load(name)
    model.eval()
    frame = corpora.load_corpus(RunConfig.from_parameters({"train_sentences": sentences})).splits["train"]
    prompts = corpora.prompt_texts(tokenizer, list(frame["sentence"]), "label")
    answers = corpora.answer_texts(tokenizer, "label")
    order = sorted(range(len(prompts)), key=lambda row: len(tokenizer(prompts[row])["input_ids"]))
    prompts = [prompts[row] for row in order]
    gold = [prompts[at] + answers[frame["label"][row]] for at, row in enumerate(order)]

    def encode(texts: list[str]):
        return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)

    @torch.no_grad()
    def answer(count: int) -> None:
        if variant.startswith("ours"):
            evaluation.score_responses(model, tokenizer, prompts[:count], [answers] * count)
            return
        size = int(variant.split()[1])
        for at in range(0, count, size):
            part = encode(prompts[at : min(at + size, count)])
            for do_sample in (True, False) if every_metric else (True,):
                model.generate(**part, do_sample=do_sample, min_new_tokens=ANSWER, max_new_tokens=ANSWER,
                               pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            if every_metric:
                part = encode(gold[at : min(at + size, count)])
                logits = model(**part, logits_to_keep=ANSWER + 1).logits[:, :-1]
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), part["input_ids"][:, -ANSWER:].flatten()
                )

    answer(8)  # warms up
    synchronise()
    start = time.perf_counter()
    answer(len(prompts))
    synchronise()
    seconds = time.perf_counter() - start
    ids = tokenizer(prompts)["input_ids"]
    tokens = sum(map(len, ids))
    shared = len(os.path.commonprefix(ids))
    # An answer is its word and EOS: the word follows from the prompt, EOS from one more token.
    plain = (tokens + len(ids)) * (2 if every_metric else 1) + (tokens + ANSWER * len(ids) if every_metric else 0)
    needed = tokens - shared * (len(ids) - 1) + len(answers) * len(ids)
    flops = 2 * (body(model) * needed + model.lm_head.weight.numel() * (1 + len(answers)) * len(ids))
    return {"seconds": seconds, "floor": plain / needed, "tokens": tokens, "flops": flops}


def body(model) -> int:
    """Parameters that every token passes: all but the embedding and the head."""
    every = {id(p): p.numel() for p in model.parameters()}
    ends = {id(p): p.numel() for p in (model.get_input_embeddings().weight, model.lm_head.weight)}
    return sum(every.values()) - sum(ends.values())


def matrix_rate(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Measured FLOP/s of square matrix products."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    synchronise()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            a @ a
        synchronise()
        count += 5
    return 2 * size**3 * count / (time.perf_counter() - start)


def main() -> None:
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    case, variant = json.loads(sys.argv[1]), sys.argv[2]
    kind = {"grpo": grpo, "sft": sft, "eval": evaluate}[case.pop("kind")]
    parameters = sum(p.numel() for p in load(case["name"])[0].parameters())
    before = peak_mb()
    result = kind(variant, **case)
    result |= {"peak_mb": peak_mb(), "loaded_mb": before, "device": device(), "parameters": parameters}
    print(json.dumps(result | {"matrix_rate": matrix_rate(torch.bfloat16 if "bf16" in variant else torch.float32)}))


if __name__ == "__main__":
    main()
