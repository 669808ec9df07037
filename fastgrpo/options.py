"""Every option of a run, in groups. Names follow TRL's and transformers' where the meaning is the same.

The docstrings below are what `fastgrpo train --help` prints. No torch here: reading options must be instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class TaskOptions:
    """Task: what is trained, on which problems, scored how.

    Attributes:
        model: Hub name, local folder, or "module:function" returning a model, a folder, or (model, tokenizer).
        processing_class: Tokenizer: hub name, folder or "module:function". Default: the model's own.
        train_dataset: Hub name, .jsonl/.json/.parquet/.csv file, folder of them, or "module:function".
        eval_dataset: The same, for evaluation.
        reward_funcs: Each a built-in (exact_match, math, regex_format, overlong_penalty), "package.module:function",
            a reward model's name, or a mapping with "name", and any of "weight", "timeout", the function's options.
    """

    model: str | None = None
    processing_class: str | None = None
    train_dataset: str | None = None
    eval_dataset: str | None = None
    reward_funcs: list[str | dict[str, Any]] = field(default_factory=list)


@dataclass(kw_only=True)
class RunOptions:
    """Run: where it is written, how long it lasts.

    Attributes:
        output_dir: The run directory: config, metrics, completions, checkpoints, summary and report.
        overwrite_output_dir: Where output_dir holds a run with other options, or resume is "never": remove that run and
            start afresh.
        allow_config_change: Go on with a run although options that decide its course were changed.
        max_steps: Optimizer steps; -1 lets num_train_epochs decide.
        num_train_epochs: Passes over the training prompts, when max_steps is -1.
        seed: Seeds the data order, sampling and factories.
        run_name: Name shown in the report and by trackers. Default: output_dir's last part.
        report_to: Trackers beside metrics.jsonl: any of tensorboard, wandb, none.
        log_completions: Write each rollout batch's completions as Parquet.
        disable_progress: Print nothing while training but warnings.
    """

    output_dir: str = "runs/grpo"
    overwrite_output_dir: bool = False
    allow_config_change: bool = False
    max_steps: int = -1
    num_train_epochs: float = 1.0
    seed: int = 42
    run_name: str | None = None
    report_to: list[Literal["tensorboard", "wandb", "none"]] = field(default_factory=lambda: ["tensorboard"])
    log_completions: bool = True
    disable_progress: bool = False


@dataclass(kw_only=True)
class ModelOptions:
    """Model: precision, device, adapters.

    Attributes:
        device: Device of the policy, such as "cuda", "cuda:1" or "cpu". "auto" takes a GPU when there is one.
        dtype: Precision of the forward pass. "auto": bfloat16 on a GPU, float32 on a CPU.
        master_weights: Keep fp32 weights, gradients and optimizer state when dtype is a 16-bit one. Steps of 1e-6
            vanish in bfloat16 weights.
        num_threads: CPU threads torch may use. Default: torch's own choice. Tiny models run fastest with 1.
        trust_remote_code: Run the code a hub repository ships with its model.
        model_revision: Branch, tag or commit of the model on the hub.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        gradient_checkpointing_every: With it, only every so many layers are recomputed: 2 = half the layers, at half
            the price. docs/update.md says what it saves.
        fused_layers: Run norms, rotations, activations and residuals of the update's layers in this project's kernels:
            fewer of them, and less memory kept for the backward. Default: on a GPU, where the model's layers are as
            Llama's or Qwen's.
        torch_compile: Compile the decoder layers of the update, which fuses norms, rotations and activations: a minute
            or two at the start. The result is the same to rounding, but no longer bitwise that of a run stopped and
            gone on with.
        use_peft: Train LoRA adapters instead of the whole model (needs the extra "peft").
        lora_r: Rank of the adapters.
        lora_alpha: Scale of the adapters (the update is multiplied by lora_alpha / lora_r).
        lora_dropout: Dropout on the adapters' input while training. Makes the ratio noisy; 0 is exact.
        lora_target_modules: Names of the linear layers that get adapters. "all-linear": all but the LM head.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    master_weights: bool = True
    num_threads: int | None = None
    trust_remote_code: bool = False
    model_revision: str | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_every: int = 1
    fused_layers: bool | None = None
    torch_compile: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: str | list[str] = "all-linear"


@dataclass(kw_only=True)
class DataOptions:
    """Data: from rows to prompts.

    Attributes:
        dataset_name: Configuration of a hub data set, such as "main".
        train_split: Split of train_dataset.
        eval_split: Split of eval_dataset.
        column_mapping: New names of columns, old: new. The problem must end up in "prompt"; all other columns reach the
            rewards under their names.
        prompt_template: Python format string over the row's columns that makes the prompt, such as
            "{prompt}\\nThink step by step.".
        system_prompt: System message put before every prompt; makes the prompt a chat.
        chat: Wrap plain-text prompts as a user's chat message. "auto": only when there is a system_prompt.
        chat_template_kwargs: Passed to the chat template, such as {enable_thinking: false}.
        shuffle_dataset: Draw the training prompts in a random order, another one every epoch.
        max_prompt_length: Longest prompt in tokens. Default: what max_completion_length leaves of the model's context.
        long_prompts: What happens to a longer one: "skip" (and count) or "error".
    """

    dataset_name: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    column_mapping: dict[str, str] | None = None
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat: Literal["auto", "always", "never"] = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    shuffle_dataset: bool = True
    max_prompt_length: int | None = None
    long_prompts: Literal["skip", "error"] = "skip"


@dataclass(kw_only=True)
class RolloutOptions:
    """Rollouts: how completions are sampled.

    Attributes:
        rollout_engine: What generates. "loop": this project's own, from the training weights themselves;
            "transformers": its continuous batching; "vllm": vLLM on the policy's device, weights synced in place;
            "vllm_server": vLLM servers, here or elsewhere. "auto": vllm on a GPU where it is installed, else loop.
        rollout_timeout: Seconds a rollout batch may take; the run then stops, to be gone on with. Default: no limit.
        async_rollouts: Sample the next batch while this one trains (vllm_server only). Its samples are one step old, so
            sampling_correction must be on.
        vllm_args: More arguments of vLLM, such as {gpu_memory_utilization: 0.5}.
        vllm_server_urls: Addresses of vLLM servers that run already. docs/rollouts.md says how they must be started.
        vllm_server_devices: Or start one here for each of these, its CUDA_VISIBLE_DEVICES: ["1", "2"].
        vllm_server_timeout: Seconds for one prompt's samples; a server that takes longer counts as hung.
        num_prompts_per_step: Prompts in a rollout batch.
        num_generations: Completions per prompt, the group.
        max_completion_length: Longest completion in tokens.
        temperature: Sampling temperature, also that of the trained distribution.
        top_k: Sample from so many likeliest tokens only; 0 = all. This and the next two bias training: it knows nothing
            of them.
        top_p: Sample from the likeliest tokens that have this probability together.
        min_p: Sample from tokens that have at least this share of the likeliest one's probability.
        check_sampling: Compare the engine's log-probs with the trainer's on the first samples; stop if they disagree.
        rollout_batch_size: Completions decoded at once; bounds the memory of the cache.
        stop_token_ids: Tokens that end a completion beside the model's end-of-sequence tokens.
        stop_strings: Pieces of text that end a completion; the token that completes one is kept whole.
        dynamic_sampling: DAPO's: draw new prompts for groups without a signal (all rewards equal).
        dynamic_sampling_max_rounds: Most times a step samples, the first time included.
    """

    rollout_engine: Literal["auto", "loop", "transformers", "vllm", "vllm_server"] = "auto"
    rollout_timeout: float | None = None
    async_rollouts: bool = False
    vllm_args: dict[str, Any] | None = None
    vllm_server_urls: list[str] = field(default_factory=list)
    vllm_server_devices: list[str] = field(default_factory=list)
    vllm_server_timeout: float = 1800.0
    num_prompts_per_step: int = 8
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    check_sampling: bool = True
    rollout_batch_size: int = 256
    stop_token_ids: list[int] = field(default_factory=list)
    stop_strings: list[str] = field(default_factory=list)
    dynamic_sampling: bool = False
    dynamic_sampling_max_rounds: int = 4


@dataclass(kw_only=True)
class RewardOptions:
    """Rewards: limits and weights.

    Attributes:
        reward_weights: One per reward function. Default: each function's own, or 1.
        reward_timeout: Seconds one call of a reward function may take; its samples then leave the step.
        overlap_rewards: Score each group as soon as it is complete, while others are still sampled. Functions are then
            called once per group, not once per batch, and need a timeout.
    """

    reward_weights: list[float] | None = None
    reward_timeout: float = 60.0
    overlap_rewards: bool = False


@dataclass(kw_only=True)
class AdvantageOptions:
    """Advantages: from rewards to what each completion, or each of its tokens, is worth. See docs/algorithms.md.

    Attributes:
        algorithm: Who is compared with whom. Decides some of the options below; those left out are the algorithm's.
        advantage_baseline: Subtracted from rewards: the group's mean (GRPO), the mean of the group's others (RLOO), of
            the batch's others, nothing.
        scale_rewards: Divided by: the group's standard deviation, the batch's, nothing (Dr. GRPO).
        advantage_whitening: Whiten the advantages over the batch afterwards (REINFORCE++, PPO).
        multi_objective_aggregation: Several rewards: sum, then normalise; or normalise each in its group first (GDPO).
        mask_truncated_completions: Completions cut by the length limit do not train, but count in their group.
        kl_coef: Weight of the KL penalty in the reward of each token; above 0 it needs a reference model. Default: 0.05
            for ppo, 0.01 for reinforce_pp, 0 for the others.
        gamma: Discount of the reward, per token; all but grpo.
        lam: Decay of GAE's trace; ppo.
        critic_model: Where ppo's critic begins: hub name, folder or "module:function". Default: the policy's weights.
        critic_learning_rate: Its peak learning rate.
        cliprange_value: How far a value may move in an update before it is no longer trained; null = any.
    """

    algorithm: Literal["grpo", "rloo", "reinforce", "reinforce_baseline", "reinforce_pp", "ppo"] = "grpo"
    advantage_baseline: Literal["auto", "mean", "leave_one_out", "batch", "none"] = "auto"
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    advantage_whitening: bool | None = None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    mask_truncated_completions: bool = False
    kl_coef: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    critic_model: str | None = None
    critic_learning_rate: float = 1e-5
    cliprange_value: float | None = 0.2


@dataclass(kw_only=True)
class LossOptions:
    """Loss: ratio, clipping, KL, corrections. The maths stands in docs/losses.md.

    Attributes:
        loss_type: Per-token loss and its aggregation.
        importance_sampling_level: Ratio per token, or per sequence (GSPO).
        epsilon: Lower clip range of the ratio.
        epsilon_high: Upper clip range; for cispo the cap itself. Default: epsilon.
        delta: Upper cap of the unclipped ratio (two-sided clipping).
        beta: Weight of the KL term against the reference model; 0 = no such term.
        kl_estimator: k1, k2 or k3 (Schulman's estimators).
        kl_bias_correction: Multiply the KL term by the ratio.
        entropy_coef: Weight of the entropy bonus.
        top_entropy_quantile: Share of the tokens, those of highest entropy, that keep their policy loss.
        off_policy_mask_threshold: Drop sequences of negative advantage that drifted further than this.
        sampling_correction: Correction for an engine whose probabilities differ from the trainer's.
        sampling_clip_max: Upper bound of that correction.
        sampling_clip_min: Lower bound of that correction.
        sapo_temperature_pos: SAPO's temperature for positive advantages.
        sapo_temperature_neg: SAPO's temperature for the others.
        vespo_k_pos: VESPO's k for non-negative advantages.
        vespo_lambda_pos: VESPO's lambda for non-negative advantages.
        vespo_k_neg: VESPO's k for negative advantages.
        vespo_lambda_neg: VESPO's lambda for negative advantages.
        sync_ref_model: Move the reference model towards the policy while training.
        ref_model_mixup_alpha: Share of the policy in that move.
        ref_model_sync_steps: Steps between two moves.
        skip_zero_advantage: Leave out work whose gradient is exactly zero.
    """

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "reinforce"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    sampling_correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    sampling_clip_max: float = 3.0
    sampling_clip_min: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    skip_zero_advantage: bool = True


@dataclass(kw_only=True)
class UpdateOptions:
    """Update: how a rollout batch becomes optimizer steps.

    Attributes:
        num_iterations: Epochs over each rollout batch.
        num_minibatches: Optimizer steps per epoch; groups stay whole.
        max_tokens_per_microbatch: Tokens in one forward pass; changes memory, never the result.
        share_prompts: Compute a prompt once for all its completions, where the model allows; changes time and memory,
            never the result.
        learning_rate: Peak learning rate.
        lr_scheduler_type: Course of the learning rate after the warm-up.
        warmup_steps: Steps over which it rises from 0.
        min_lr_ratio: Where linear and cosine end, as a share of learning_rate.
        weight_decay: AdamW's, on matrices only.
        adam_beta1: AdamW's.
        adam_beta2: AdamW's.
        adam_epsilon: AdamW's.
        max_grad_norm: Gradients are scaled down to this norm; 0 = never.
        max_skipped_steps: Steps in a row with a non-finite gradient that stop the run.
    """

    num_iterations: int = 1
    num_minibatches: int = 1
    max_tokens_per_microbatch: int = 16384
    share_prompts: bool = True
    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 5


@dataclass(kw_only=True)
class EvalOptions:
    """Evaluation: sampled on held-out prompts.

    Attributes:
        eval_steps: Evaluate every so many steps; 0 = never between start and end.
        eval_on_start: Evaluate before the first step.
        eval_on_end: Evaluate after the last step.
        eval_max_prompts: Use only so many of the evaluation prompts.
        eval_num_generations: Completions per prompt, the k of avg@k and pass@k.
        eval_temperature: Sampling temperature. Default: temperature.
        eval_max_completion_length: Default: max_completion_length.
        eval_pass_threshold: A completion passes when its reward is at least this; accuracy is the share that passes.
    """

    eval_steps: int = 0
    eval_on_start: bool = True
    eval_on_end: bool = True
    eval_max_prompts: int | None = None
    eval_num_generations: int = 1
    eval_temperature: float | None = None
    eval_max_completion_length: int | None = None
    eval_pass_threshold: float = 1.0


@dataclass(kw_only=True)
class SaveOptions:
    """Checkpoints.

    Attributes:
        save_steps: Save every so many steps; 0 = only the last one.
        save_total_limit: Keep only so many checkpoints, the newest.
    """

    save_steps: int = 50
    save_total_limit: int | None = 2


GROUPS: tuple[type, ...] = (
    RunOptions,
    ModelOptions,
    DataOptions,
    RolloutOptions,
    RewardOptions,
    AdvantageOptions,
    LossOptions,
    UpdateOptions,
    EvalOptions,
    SaveOptions,
)
"""The groups GRPOConfig is made of, in the order `--help` shows them."""
