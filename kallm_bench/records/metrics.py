"""Every metric there is: its unit, which way is better, how it is computed. A record with another name is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricKind:
    """One row of the table. `better` is "" where neither way is."""

    unit: str
    better: Literal["higher", "lower", ""]
    computed: str


METRICS: dict[str, MetricKind] = {
    "parameters": MetricKind("parameters", "lower", "all values of the model; tied ones count once"),
    "trainable_parameters": MetricKind("parameters", "lower", "values that learn in the training scope"),
    "replaced_parameters": MetricKind("parameters", "lower", "values of the modules that a retrofit put in"),
    "heldout_loss": MetricKind("nats/token", "lower", "mean cross-entropy on the assistant's tokens of held-out rows"),
    "heldout_loss_before": MetricKind("nats/token", "lower", "the same before the first step, or before a retrofit"),
    "start_r2": MetricKind("fraction of variance", "higher", "of a replaced block's output, on held-out rows"),
    "start_seconds": MetricKind("s", "lower", "to find where the new parameters start"),
    "conversion_error": MetricKind("relative", "lower", "largest miss of a change of basis over its domain"),
    "train_loss": MetricKind("nats/token", "lower", "mean over the last tenth of the steps; samples: every step"),
    "heldout_curve": MetricKind(
        "nats/token", "lower", "the lowest of the held-out losses of a training run; samples: all"
    ),
    "trained_tokens": MetricKind("tokens", "", "tokens seen in training, loss-bearing or not"),
    "accuracy": MetricKind("fraction", "higher", "right answers; without a task: the plain mean over tasks"),
    "accuracy_low": MetricKind(
        "fraction", "higher", "lower end of its 95 % interval: Bayesian bootstrap over questions"
    ),
    "accuracy_high": MetricKind("fraction", "higher", "upper end of the same"),
    "target_loglikelihood": MetricKind(
        "nats", "higher", "ln p of the right answer, mean over questions; in all: over the tasks that have choices"
    ),
    "likeliest_accuracy": MetricKind(
        "fraction", "higher", "questions with choices whose right one is the likeliest a character; in all: over tasks"
    ),
    "likeliest_accuracy_low": MetricKind("fraction", "higher", "lower end of its 95 % interval, as of accuracy"),
    "likeliest_accuracy_high": MetricKind("fraction", "higher", "upper end of the same"),
    "likeliest_guessing": MetricKind("fraction", "", "guessing_accuracy, mean over the tasks that have choices"),
    "class_accuracy": MetricKind("fraction", "higher", "right classes of held-out texts; with a class: of its texts"),
    "class_loss": MetricKind("nats/text", "lower", "mean cross-entropy of the class of texts in the held-out rows"),
    "class_loss_before": MetricKind("nats/text", "lower", "the same before the first step"),
    "class_loss_curve": MetricKind("nats/text", "lower", "the lowest of those of a training run; samples: all"),
    "class_train_loss": MetricKind("nats/text", "lower", "mean over the last tenth of the steps; samples: every step"),
    "guessing_accuracy": MetricKind("fraction", "", "expected when choosing evenly among the choices listed"),
    "majority_accuracy": MetricKind("fraction", "", "always the most frequent answer of the task"),
    "question_accuracy": MetricKind("fraction", "higher", "right answers over all questions, as lm-eval averages them"),
    "question_accuracy_error": MetricKind("fraction", "lower", "its standard error, variance pooled within tasks"),
    "leaderboard_score": MetricKind("%", "higher", "each task from guessing, 0, to all right; their mean"),
    "invalid_rate": MetricKind("fraction", "lower", "replies in which no answer could be read"),
    "cut_prompts": MetricKind("prompts", "lower", "prompts whose beginning did not fit into the model's context"),
    "forwarded_tokens": MetricKind(
        "tokens", "lower", "put through the model by an evaluation; what a task's prompts share counts once"
    ),
    "flops_per_token": MetricKind(
        "FLOP/token", "lower", "2 per weight of each matrix product, forward, no attention scores"
    ),
    "load_seconds": MetricKind("s", "lower", "from the disk to a model on its device"),
    "prefill_tokens_per_second": MetricKind("tokens/s", "higher", "one forward pass over full prompts"),
    "decode_tokens_per_second": MetricKind(
        "tokens/s", "higher", "greedy, one token a sequence and step, with a KV cache"
    ),
    "train_tokens_per_second": MetricKind(
        "tokens/s", "higher", "forward, backward and optimiser, by the median step; of a profile at its own batch"
    ),
    "prefix_cache_share": MetricKind(
        "fraction", "", "of the rows trained on, those whose way through frozen blocks was read; null without a cache"
    ),
    "train_to_plain": MetricKind("times", "higher", "train_tokens_per_second over the plain loop's"),
    "train_seconds": MetricKind("s", "lower", "all steps, held-out losses and saved states of a training run"),
    "train_flops_per_token": MetricKind(
        "FLOP/token", "lower", "what a training step cannot do without: forward once, gradients where something learns"
    ),
    "bearing_share": MetricKind("fraction", "", "of the positions of training rows, those that bear loss"),
    "train_mfu": MetricKind("fraction", "higher", "those FLOP a second, over what the GPU's data sheet promises"),
    "peak_resident_bytes": MetricKind("bytes", "lower", "largest resident memory in training, or in the phase named"),
    "peak_vram_allocated_bytes": MetricKind(
        "bytes", "lower", "largest GPU memory held by tensors in training, or in the phase named"
    ),
    "peak_vram_reserved_bytes": MetricKind(
        "bytes", "lower", "largest GPU memory held by the allocator, which also keeps what CUDA graphs use"
    ),
    "forward_seconds": MetricKind("s", "lower", "one forward of a layer alone, median; after the slash: whose layer"),
    "forward_backward_seconds": MetricKind("s", "lower", "forward and the gradients of input and parameters, median"),
    "forward_to_limit": MetricKind("times", "lower", "forward_seconds over that of the limit, in the same record"),
    "forward_backward_to_limit": MetricKind("times", "lower", "forward_backward_seconds over that of the limit"),
    "timing_spread": MetricKind("fraction", "lower", "range of the samples over their median, the larger of both"),
    "saved_bytes": MetricKind("bytes", "lower", "kept from forward for backward, beyond input, output and parameters"),
    "peak_bytes": MetricKind("bytes", "lower", "most GPU memory in forward and backward, beyond input and parameters"),
    "accuracy_difference": MetricKind("points", "higher", "accuracy less the reference's; interval over questions"),
    "detectable_difference": MetricKind("points", "lower", "the smallest that these questions show four times in five"),
    "likelihood_difference": MetricKind(
        "nats", "higher", "target_loglikelihood less the reference's; interval over questions"
    ),
    "heldout_loss_difference": MetricKind("nats/token", "lower", "less the reference's; interval over seeds"),
    "class_loss_difference": MetricKind("nats/text", "lower", "less the reference's; interval over seeds"),
    "tokens_to_reference": MetricKind(
        "times", "lower", "tokens to the reference's final held-out loss over all that the reference was trained with"
    ),
    "parameters_to_reference": MetricKind("times", "lower", "parameters over the reference's"),
    "prefill_to_reference": MetricKind("times", "higher", "prefill_tokens_per_second over the reference's"),
    "decode_to_reference": MetricKind("times", "higher", "decode_tokens_per_second over the reference's"),
    "train_to_reference": MetricKind("times", "higher", "train_tokens_per_second over the reference's"),
    "memory_to_reference": MetricKind("times", "lower", "peak memory of training over the reference's"),
    "relative_error": MetricKind("relative", "lower", "norm of the miss of float64's output or gradient, the largest"),
    "prefill_seconds": MetricKind("s", "lower", "a forward pass over all prompts: what the first new token waits for"),
    "decode_seconds": MetricKind("s", "lower", "one more token of every sequence, mean over the tokens of a run"),
    "prefill_joules_per_token": MetricKind(
        "J/token", "lower", "by NVML's counter of the whole GPU's energy, over at least two seconds"
    ),
    "decode_joules_per_token": MetricKind("J/token", "lower", "the same, a new token, less what the prompts take"),
    "train_joules_per_token": MetricKind("J/token", "lower", "the same, of a training step"),
    "prefill_mfu": MetricKind(
        "fraction", "higher", "the products' FLOP a second, the head's where it is needed, over the data sheet's"
    ),
    "decode_mfu": MetricKind("fraction", "higher", "the same of decoding"),
    "prefill_roofline": MetricKind(
        "fraction", "higher", "the longer of those FLOP's time and the least bytes' by the data sheet, over the time"
    ),
    "decode_roofline": MetricKind("fraction", "higher", "the same of decoding: weights and cache, read at each step"),
    "train_roofline": MetricKind("fraction", "higher", "the same of a training step: weights, gradients and moments"),
    "peak_vram_process_bytes": MetricKind(
        "bytes", "lower", "largest GPU memory of the process that NVML told, the CUDA context included"
    ),
    "peak_vram_device_bytes": MetricKind("bytes", "lower", "the same of the whole device, whoever holds it"),
    "prefill_part_seconds": MetricKind(
        "s", "lower", "a part's share of a prefill, all blocks together; marks between the parts take time too"
    ),
    "decode_part_seconds": MetricKind("s", "lower", "the same of one step of decoding"),
    "part_parameters": MetricKind("parameters", "lower", "values of a part; a tied embedding is the head's"),
    "part_flops_per_token": MetricKind("FLOP/token", "lower", "those of flops_per_token that a part does"),
    "ratio": MetricKind("times", "", "a profile's figure over that of the model measured in turn with it"),
    "ratio_low": MetricKind("times", "", "lower end of its 95 % interval over rounds"),
    "ratio_high": MetricKind("times", "", "upper end of its 95 % interval over rounds"),
}
"""Keyed by name. A name may carry a part after a slash: "accuracy/snarks" is the accuracy on that task."""


def kind_of(name: str) -> MetricKind:
    """The table's row for a metric, whatever follows its slash. KeyError for a name that has none."""
    return METRICS[name.partition("/")[0]]
