"""The keys of timm's `args.yaml`: those read, those without a setting here, those without effect.

The names and defaults of timm's `train.py` of August 2026, and of older ones.
"""

from __future__ import annotations

from typing import Any

from lbaccel.recipe.values import words

REQUIRED = ("batch_size", "model", "opt", "epochs", "sched")

# Read where a file departs from the script's default, which is lbaccel's default too.
ALIKE: dict[str, Any] = {
    "scale": [0.08, 1.0],
    "ratio": [3 / 4, 4 / 3],
    "hflip": 0.5,
    "color_jitter": 0.4,
    "model_kwargs": {},
    "bce_loss": False,
    "reprob": 0.0,
    "remode": "pixel",
    "recount": 1,
    "aug_repeats": 0,
    "kd_model_name": None,
    "kd_distill_type": "logit",
    "kd_loss_type": "kl",
    "kd_temperature": 4.0,
    "task_loss_weight": None,
    "distill_loss_weight": None,
}

# The keys that the contract needs, with the script's default where a file leaves one out.
READ: dict[str, Any] = {
    **dict.fromkeys(REQUIRED),
    "grad_accum_steps": 1,
    "sync_bn": False,
    "dist_bn": "reduce",
    "lr": None,
    "lr_base": 0.1,
    "lr_base_size": 256,
    "lr_base_scale": "",
    "warmup_lr": 1e-5,
    "warmup_epochs": 5,
    "warmup_prefix": False,
    "cooldown_epochs": 0,
    "min_lr": 0.0,
    "sched_on_updates": False,
    "decay_epochs": 90,
    "decay_milestones": [90, 180, 270],
    "decay_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 2e-5,
    "clip_grad": None,
    "clip_mode": "norm",
    "layer_decay": None,
    "smoothing": 0.1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mixup_mode": "batch",
    "drop": 0.0,
    "drop_path": None,
    "aa": None,
    "train_interpolation": "random",
    "model_ema": False,
    "model_ema_decay": 0.9998,
    "model_ema_warmup": False,
    "bn_momentum": None,
    "num_classes": None,
    "img_size": None,
    "input_size": None,
    "mean": None,
    "std": None,
    "interpolation": "",
    "crop_pct": None,
    "amp": False,
    "amp_dtype": "float16",
    "pretrained": False,
    "pretrained_path": None,
    "initial_checkpoint": "",
    "seed": 42,
    "data": None,
    "data_dir": None,
    "dataset": "",
    "channels_last": False,
    "grad_checkpointing": False,
    "checkpoint_hist": 10,
    **ALIKE,
}

# Nothing in the contract says these: a gap where the file departs from the script's default.
AT_DEFAULT: dict[str, Any] = {
    "lr_noise": None,
    "lr_cycle_mul": 1.0,
    "lr_cycle_limit": 1,
    "lr_k_decay": 1.0,
    "epoch_repeats": 0.0,
    "start_epoch": None,
    "resume": "",
    "opt_eps": None,
    "opt_betas": None,
    "opt_kwargs": {},
    "layer_decay_min_scale": 0,
    "layer_decay_no_opt_scale": None,
    "no_aug": False,
    "train_crop_mode": None,
    "vflip": 0.0,
    "color_jitter_prob": None,
    "grayscale_prob": None,
    "gaussian_blur_prob": None,
    "aug_splits": 0,
    "split_bn": False,
    "jsd_loss": False,
    "bce_sum": False,
    "bce_target_thresh": None,
    "bce_pos_weight": None,
    "resplit": False,
    "cutmix_minmax": None,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_off_epoch": 0,
    "drop_connect": None,
    "drop_block": None,
    "bn_eps": None,
    "gp": None,
    "in_chans": None,
    "head_init_scale": None,
    "head_init_bias": None,
    "model_dtype": None,
    "train_num_samples": None,
    "train_img_sizes": None,
    "train_batch_sizes": None,
    "train_batches_per_epoch": None,
    "naflex_loader": False,
    "class_map": "",
    "tta": 0,
}

# Without effect on the result, or read only where a setting above departs from its default.
NEUTRAL = frozenset(
    words(
        """
    aa_magnitude amp_impl batch_split bn_tf checkpoint_interval config dataset_download
    dataset_trust_remote_code decay_epochs_min device device_modules dist_backend dist_url
    distributed eval_metric experiment fast_norm fuser input_img_mode input_key
    jit kd_student_feature_dim kd_teacher_feature_dim
    kd_token_distill_type local_rank log_interval log_wandb lr_cycle_decay lr_noise_pct lr_noise_std
    model_ema_force_cpu naflex_loss_scale naflex_max_seq_len naflex_patch_size_probs
    naflex_patch_sizes naflex_patchify_channels_first naflex_train_seq_lens native_amp no_ddp_bb
    no_prefetcher no_resume_opt output patience_epochs pin_mem prefetcher
    recovery_interval save_images synchronize_step target_key
    torchcompile torchcompile_mode torchscript train_size_probs train_size_random_mix
    train_size_schedule train_size_schedule_spread train_split use_multi_epochs_loader val_interval
    val_num_samples val_split validation_batch_size variable_batch_loss_scale wandb_project
    wandb_resume_id wandb_tags worker_seeding workers
        """
    )
)

OWN_REASONS = {
    "resume": (
        "a run of timm's can't be gone on with",
        "--checkpoint FILE starts from its weights, with a fresh optimizer and schedule",
    ),
    "in_chans": ("channels follow the data", "data of as many channels"),
}
