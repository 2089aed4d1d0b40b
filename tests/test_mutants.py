"""Each trap's naive line, put back into a copy of the package, must fail a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# name: (module, the line that is right, the naive line, tests that must notice)
MUTANTS = {
    "a trace takes the stand-in GPU for a device of autograd's": (
        "planning.cost.trace",
        '        torch.ones((), device="cpu", requires_grad=True).backward()\n',
        "        pass\n",
        "tests/test_trace.py::test_a_process_can_fork_after_a_trace_and_a_backward_pass",
    ),
    "a workspace is measured below the samples where its algorithm changes": (
        "planning.cost.kernel_memory",
        "        first = MANY\n",
        "        pass\n",
        "tests/test_kernel_memory.py::test_the_path_that_ATen_changes_at_16_samples_is_followed",
    ),
    "a workspace holds for any number of threads": (
        "planning.cost.kernel_memory",
        "        torch.get_num_threads(),\n",
        "        1,\n",
        "tests/test_kernel_memory.py::test_each_number_of_threads_has_workspaces_of_its_own",
    ),
    "a kernel that can't be measured takes nothing": (
        "planning.cost.workspace",
        "return assumed_workspace(name, args, out)",
        "return 0",
        "tests/test_kernel_memory.py",
    ),
    "a plan has no margin": (
        "planning.cost.workspace",
        "return MARGIN * torch.get_num_threads()",
        "return 0",
        "tests/test_measure.py::"
        "test_the_measured_peak_is_below_the_predicted_one_and_at_most_its_margin_below",
    ),
    "random states are not traced": (
        "planning.cost.update",
        "            recorder.watch(state)\n",
        "            pass\n",
        "tests/test_trace.py::test_the_traced_peak_is_that_of_the_real_allocator",
    ),
    "a resume scales the groups again": (
        "optim.groups",
        "stands_at = group.get(SCALED_TO, base_batch_size)",
        "stands_at = base_batch_size",
        "tests/test_groups.py",
    ),
    "layer decay and head factor are left to timm's schedulers": (
        "recipe.optimizer",
        "    apply_lr_scale(optimizer)\n",
        "",
        "tests/test_groups.py",
    ),
    "the head's rate is logged": (
        "train",
        "lr = reference_lr(t.scheduler.optimizer)",
        "lr = max(t.scheduler.get_last_lr())",
        "tests/test_groups.py::"
        "test_the_recipe_logs_the_rate_without_the_head_s_factor_and_resumes_with_it",
    ),
    "momentum keeps the old learning rate": (
        "optim.momentum",
        "held.mul_(lr / before)",
        "pass",
        "tests/test_momentum.py",
    ),
    "a resume corrects the momentum from nothing": (
        "optim.momentum",
        "                group[IN] = lr\n",
        "                group[IN] = optimizer.defaults['lr']\n",
        "tests/test_momentum.py",
    ),
    "the average keeps its decay an update": (
        "hyperparameters.items",
        "old**m.k",
        "old",
        "tests/test_transfer.py",
    ),
    "LARS without weight decay is built as SGD": (
        "optim.optimizers",
        "    _check_trust_ratio(name, weight_decay)\n",
        "",
        "tests/test_trust_ratio.py",
    ),
    "LAMB clips at 1.0 beside the clipping asked for": (
        "optim.optimizers",
        'options["max_grad_norm"] = None',
        "pass",
        "tests/test_trust_ratio.py",
    ),
    "LEGW's warmup is saved multiplied": (
        "recipe.rate",
        '"warmup_epochs": self.asked_warmup_epochs',
        '"warmup_epochs": self.warmup_epochs',
        "tests/test_groups.py",
    ),
    "tail divided by the full batch": (
        "update.transaction",
        "self._try(micro_batches, loss_fn, update.num_samples)",
        "self._try(micro_batches, loss_fn, 8)",
        "tests/test_engine.py",
    ),
    "every micro-batch weighs the same": (
        "update.accumulation",
        "weight = float(micro_batch.num_samples)",
        "weight = num_samples / 6",
        "tests/test_engine.py",
    ),
    "mean of means of weighted losses": (
        "update.accumulation",
        "weight = weight.detach().double()",
        "weight = torch.tensor(float(micro_batch.num_samples)).double()",
        "tests/test_engine.py",
    ),
    "no division by the weights": (
        "update.transaction",
        "divisor = agreement.weight / update.num_samples if agreement.own_weights else 1.0",
        "divisor = 1.0",
        "tests/test_engine.py",
    ),
    "gradients averaged over the ranks": (
        "update.accumulation",
        "    dist.all_reduce(flat)\n",
        "    dist.all_reduce(flat)\n    flat /= dist.get_world_size()\n",
        "tests/test_masks.py::test_ranks_draw_the_masks_of_one_process",
    ),
    "each micro-batch clipped": (
        "update.accumulation",
        "                backward(scaled)\n",
        "                backward(scaled)\n"
        "            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n",
        "tests/test_engine.py",
    ),
    "the last micro-batch's loss is logged": (
        "update.accumulation",
        "loss_sum = loss_sum + loss.detach().double() * weight",
        "loss_sum = loss.detach().double() * num_samples",
        "tests/test_engine.py",
    ),
    "the last short update of a run is forgotten": (
        "batch.stream",
        "return max(1, first + max(0, -(-rest // self.size_in(whole))))",
        "return max(1, first + max(0, rest // self.size_in(whole)))",
        "tests/data/test_loader.py tests/test_recipe.py tests/test_batch.py",
    ),
    "trials without a backward pass": (
        "update.accumulation",
        "                backward(scaled)\n",
        "                backward(scaled) if num_samples > 24 else None\n",
        "tests/test_oom.py::test_a_trial_runs_the_backward_pass_of_two_micro_batches",
    ),
    "clipping skipped": (
        "update.sharding.replicated",
        "if self._clip_grad_norm is not None and finite:",
        "if False:",
        "tests/test_engine.py",
    ),
    "loss scale not undone before clipping": (
        "update.sharding.replicated",
        "scaler.unscale_(self._optimizer.optimizer)",
        "pass",
        "tests/test_engine.py",
    ),
    "overflow moves the counters": (
        "update.sharding.replicated",
        '"skipped" if self._optimizer.step_was_skipped else "written"',
        '"written"',
        "tests/test_engine.py",
    ),
    "scheduler steps twice": (
        "update.engine",
        "after_update(self._scheduler, dropped=dropped)",
        "after_update(self._scheduler, dropped=dropped); self._scheduler.step()",
        "tests/test_engine.py",
    ),
    "statistics of a failed update stay": (
        "update.normalization",
        "self._pending.zero_()",
        "pass",
        "tests/test_normalization.py tests/test_engine.py",
    ),
    "not finite is not noticed": (
        "update.sharding.replicated",
        "if not finite and scaler is None:",
        "if False:",
        "tests/test_engine.py",
    ),
    "weights cast in every micro-batch": (
        "update.transaction",
        "cache = _autocast_cache(device.type) if keeps else nullcontext()",
        "cache = nullcontext()",
        "tests/test_engine.py",
    ),
    "recompute moves statistics": (
        "update.ghost_layers",
        "discard = norm.recomputing or norm.micro_batch.is_filler",
        "discard = norm.micro_batch.is_filler",
        "tests/test_normalization.py",
    ),
    "a filler moves statistics": (
        "update.ghost_layers",
        "discard = norm.recomputing or norm.micro_batch.is_filler",
        "discard = norm.recomputing",
        "tests/test_normalization.py",
    ),
    "BatchNorm over the micro-batch": (
        "update.ghost_layers",
        "if len(sizes) == 1:\n",
        "if True:\n",
        "tests/test_normalization.py tests/test_equality.py",
    ),
    "merged variance without the spread of the means": (
        "update.ghost_layers",
        "m2 += m2_b + delta.square_().mul_(n * (n_b / (n + n_b)))",
        "m2 += m2_b",
        "tests/test_normalization.py",
    ),
    "merged variance without Bessel's correction": (
        "update.normalization",
        "(layer.running_var, m2 / (n - 1))",
        "(layer.running_var, m2 / n)",
        "tests/test_normalization.py",
    ),
    "statistics of ranks in any order": (
        "update.normalization",
        "(1 - layer.momentum) ** after",
        "(1 - layer.momentum) ** (0 * after)",
        "tests/test_normalization.py",
    ),
    "BatchNormAct2d left out": (
        "update.ghost_layers",
        "for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)",
        "for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)",
        "tests/test_normalization.py",
    ),
    "recompute with other masks": (
        "randomness.masks",
        "if token not in self._calls:\n            if self._recomputing:",
        "if self._recomputing:\n            self._calls[token] = len(self._calls)\n"
        "        if token not in self._calls:\n            if False:",
        "tests/test_masks.py tests/test_checkpointing_masks.py",
    ),
    "masks of the micro-batch, not of the sample": (
        "randomness.masks",
        "positions = torch.arange(start, start + samples, device=x.device)",
        "positions = torch.arange(samples, device=x.device)",
        "tests/test_masks.py",
    ),
    "the same masks in every layer": (
        "randomness.masks",
        "self._calls[token] = len(self._calls)\n",
        "self._calls[token] = 0\n",
        "tests/test_masks.py",
    ),
    "the same masks in every update": (
        "randomness.masks",
        "return int(keyed_hash(self.seed, MASKS, self._update))",
        "return int(keyed_hash(self.seed, MASKS, 0))",
        "tests/test_masks.py",
    ),
    "an update moves the user's random state": (
        "randomness.masks",
        "            restore_generators(states, self.device)",
        "            pass",
        "tests/test_masks.py",
    ),
    "any RuntimeError counts as a lack of memory": (
        "update.memory.oom",
        "if _CERTAIN.search(text):",
        "if True:",
        "tests/test_oom.py::test_nothing_else_counts",
    ),
    "std::bad_alloc is missed": (
        "update.memory.oom",
        'r"^std::bad_alloc\\b",',
        "",
        "tests/test_oom.py::test_each_librarys_way_to_say_it_counts",
    ),
    "only the rank that ran out shrinks": (
        "update.accumulation",
        "if num_ran_out:",
        "if ran_out:",
        "tests/test_oom.py::test_ranks_shrink_together_wherever_one_of_them_runs_out",
    ),
    "statistics of the failed attempt are kept": (
        "update.transaction",
        "        self.drop()\n        device, world_size",
        "        device, world_size",
        "tests/test_oom.py::test_an_update_that_ran_out_of_memory_is_that_of_a_run_with_smaller_micro_batches",
    ),
    "random state of the failed attempt goes on": (
        "randomness.masks",
        "seed_generators(int(seed), self.device)",
        "pass",
        "tests/test_masks.py::test_what_cannot_be_keyed_depends_on_no_micro_batch_that_ran_before",
    ),
    "the failed attempt's frames live on": (
        "update.memory.oom",
        "traceback.clear_frames(error.__traceback__)\n        error.__traceback__ = None",
        "pass",
        "tests/test_oom.py::test_the_failed_attempt_holds_no_activation_when_its_memory_is_given_back",
    ),
    "the global batch shrinks with the micro-batch": (
        "update.memory.adaptive",
        "self.plan = replace(self.plan, micro_batch_size=size)",
        "self.plan = replace(self.plan, micro_batch_size=size, global_batch_size=size)",
        "tests/test_oom.py::test_the_micro_batch_grows_again_and_trying_costs_less_and_less",
    ),
    "the retry goes on in the workers' old batches": (
        "data.loader",
        "self._drawn = HALF_READ",
        "self._drawn = index",
        "tests/data/test_loader.py::test_an_update_that_was_read_in_part_is_read_anew_from_its_start",
    ),
    "a plan for DDP counts one bucket where a parameter is larger": (
        "planning.estimate",
        "buckets = self.gradient_bytes + self._reduction_bytes",
        "buckets = self.gradient_bytes + min(25 * 2**20, self.gradient_bytes)",
        "tests/test_reduction_memory.py",
    ),
    "cuDNN's lack of an engine is no lack of memory": (
        "update.memory.oom",
        r"""            r"\b[Uu]nable to find an engine to execute this computation\b",""",
        "",
        "tests/test_oom.py::test_a_text_with_several_reasons_counts_where_memory_is_short",
    ),
    "a restored model's updates go on without ghost batches": (
        "update.normalization",
        "        if self.restored:\n",
        "        if False:\n",
        "tests/test_normalization.py::"
        "test_a_model_that_was_restored_evaluates_as_before_and_its_updates_are_refused",
    ),
    "a copied SyncBatchNorm layer talks to the other ranks": (
        "update.ghost_layers",
        '        "__deepcopy__": _ghost_deepcopy,\n',
        "",
        "tests/test_normalization.py::"
        "test_a_copied_sync_layer_stays_converted_since_a_plain_one_would_talk_to_the_other_ranks",
    ),
    "a user's own fetch is called": (
        "data.loader",
        'FETCH = "__lbaccel_fetch__"',
        'FETCH = "fetch"',
        "tests/data/test_loader.py::test_a_users_own_fetch_is_not_called",
    ),
    "an update cut anew sets the size of those to come": (
        "data.loader",
        "            return self._load_from(index, plan)\n        if self._batches",
        "            self.plan, self._batches = plan, None\n        if self._batches",
        "tests/data/test_loader.py::"
        "test_an_update_cut_anew_leaves_the_loader_and_what_it_loads_ahead_alone",
    ),
    "the workers go on in the size that ran out of memory": (
        "update.engine",
        "            update.loader.set_micro_batch_size(size)\n",
        "            pass\n",
        "tests/test_oom.py::test_the_loader_loads_ahead_in_the_size_that_memory_allows",
    ),
    "a search that leaves gradients behind": (
        "update.engine",
        "            finally:\n                transaction.drop()",
        "            finally:\n                pass",
        "tests/test_oom.py::test_the_search_finds_the_largest_size_and_leaves_everything_as_it_was",
    ),
    "a search that takes the update away": (
        "data.loader",
        "return self._update(self.next_update)",
        "self.next_update += 1; return self._update(self.next_update - 1)",
        "tests/test_oom.py::test_the_search_finds_the_largest_size_and_leaves_everything_as_it_was",
    ),
    "a step that failed half way is forgotten": (
        "update.sharding.replicated",
        "self.half_stepped = True",
        "pass",
        "tests/test_oom.py::test_memory_that_runs_out_in_the_optimizers_step_is_never_retried",
    ),
    "no room is kept for the optimizer's state": (
        "update.sharding.replicated",
        "self._reservation = Reservation(self._optimizer.optimizer)",
        "self._reservation = Reservation(__import__('torch').optim.SGD(self.parameters, lr=1.0))",
        "tests/test_oom.py::test_room_for_the_state_is_held_until_the_step",
    ),
    "lines of lost updates stay": (
        "runs.tracking",
        'if row["update"] <= update:',
        "if True:",
        "tests/test_resume.py::test_a_run_may_be_resumed_many_times_and_from_an_older_checkpoint",
    ),
    "checksums are not compared": (
        "runs.checkpoints",
        'if found["sha256"] != expected["sha256"]:',
        "if False:",
        "tests/test_resume.py::test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken",
    ),
    "a checkpoint is renamed before it is on the disk": (
        "runs.folder",
        "        _flush(beside)\n",
        "",
        "tests/test_checkpoints.py",
    ),
    "a resume passes over a checkpoint that can't be read, and removes it": (
        "runs.checkpoints",
        "        except CannotRead:\n            raise\n",
        "",
        "tests/test_checkpoints.py::"
        "test_a_checkpoint_that_can_not_be_read_stops_a_resume_and_is_not_passed_over",
    ),
    "an old folder does not come back": (
        "runs.folder",
        "            aside.rename(target)\n",
        "            pass\n",
        "tests/runs/test_written_beside.py::"
        "test_the_old_folder_comes_back_where_the_new_one_can_not_take_its_place",
    ),
    "a disk that refuses is asked for space": (
        "errors",
        "refused = isinstance(error, OSError) and error.errno in _REFUSED",
        "refused = False",
        "tests/test_checkpoints.py::test_the_way_out_fits_the_disk_s_reason",
    ),
    "a class folder that can't be read is taken for an empty one": (
        "data.sources",
        "os.walk(folder, onerror=refuse, followlinks=True)",
        "os.walk(folder, followlinks=True)",
        "tests/data/test_sources.py::"
        "test_a_folder_that_can_not_be_read_is_named_and_not_taken_for_an_empty_one",
    ),
    "a plot that can't be written is refused after the work": (
        "commands.lr_find",
        "    check_plot(own.plot)\n",
        "",
        "tests/commands/test_unwritable.py",
    ),
    "the mean to be logged is forgotten": (
        "runs.log",
        'self.window = [(float(loss), int(n)) for loss, n in state["window"]]',
        "self.window = []",
        "tests/test_resume.py::test_a_resumed_run_is_the_unbroken_one_to_the_bit",
    ),
    "a cosine is stretched in silence": (
        "recipe.optimizer",
        'if self.options.schedule != "cosine" or how == "stretch":',
        'if self.options.schedule != "cosine" or how in ("stretch", None):',
        "tests/test_resume.py::test_a_cosine_asks_how_it_goes_on_and_shows_the_three_in_numbers",
    ),
    "a resume changes the contract": (
        "recipe.resume",
        "if value not in (has, saved.asked.get(name, has)):",
        "if False:",
        "tests/test_resume.py::test_a_setting_that_decides_the_result_cannot_change",
    ),
    "a resume starts the epoch anew": (
        "data.loader",
        'self.next_update, self._batches = int(state["next_update"]), None',
        "self.next_update, self._batches = 0, None",
        "tests/test_resume.py::test_a_resumed_run_is_the_unbroken_one_to_the_bit",
    ),
    "the resumed update has the old schedule's rate": (
        "runs.session",
        '        refresh(self.parts["scheduler"])',
        "        pass",
        "tests/test_resume.py::test_each_way_to_extend_a_cosine_has_the_rates_it_says",
    ),
    "ranks stop when they like": (
        "update.accumulation",
        "    if stop_sum:\n",
        "    agreed = stop\n    if False:\n",
        "tests/test_resume.py::test_an_interrupt_on_one_rank_outweighs_a_time_limit_on_another",
    ),
    "DeepSpeed steps by its own count of micro-steps": (
        "update.sharding.zero",
        "            self.engine.set_gradient_accumulation_boundary(True)\n            try:",
        "            try:",
        "tests/distributed/test_zero.py",
    ),
    "each micro-step is DeepSpeed's last": (
        "update.sharding.zero",
        "self.engine.set_gradient_accumulation_boundary(last and not self.droppable)",
        "pass",
        "tests/distributed/test_zero.py",
    ),
    "DeepSpeed divides by its own number of micro-steps": (
        "update.sharding.zero",
        ", scale_wrt_gas=False)",
        ")",
        "tests/distributed/test_zero.py",
    ),
    "DeepSpeed divides by the number of ranks": (
        "update.sharding.zero",
        "divisor /= self._world_size",
        "pass",
        "tests/distributed/test_zero.py",
    ),
    "bf16 is asked for under DeepSpeed, and float32 runs": (
        "update.sharding.prepare",
        "        wrap_forward(model, accelerator)\n",
        "",
        "tests/distributed/test_zero.py",
    ),
    "DeepSpeed's own bf16 runs": (
        "update.sharding.precision",
        '    section["enabled"] = False\n',
        "",
        "tests/distributed/test_zero.py tests/test_zero_config.py",
    ),
    "casts of weights outlive the forward that gathered them": (
        "update.transaction",
        "keeps = self.sharding.droppable",
        "keeps = True",
        "tests/distributed/test_zero.py",
    ),
    "FSDP2 divides by the number of ranks": (
        "update.sharding.fsdp",
        "(loss * self._world_size).backward()",
        "loss.backward()",
        "tests/distributed/test_fsdp.py",
    ),
    "Accelerate clips at 1.0": (
        "update.sharding.zero_config",
        '    config["gradient_clipping"] = wanted\n',
        "",
        "tests/test_zero_config.py",
    ),
    "a base batch that was given and is the default is overridden": (
        "recipe.rate",
        "if not given or rule is None",
        "if rate.base_batch_size == 256 or rule is None",
        "tests/test_scaling.py::test_the_recipe_s_rate_per_n_samples_is_swin_s",
    ),
    "rates of a batch schedule compound": (
        "recipe.growth",
        "[f for start, f in starts if start <= samples_seen][-1]",
        "__import__('math').prod(f for start, f in starts if start <= samples_seen)",
        "tests/test_growth.py",
    ),
    "the batch grows an epoch late": (
        "batch.phases",
        "(segment.epoch - 1, segment.global_batch_size)",
        "(segment.epoch, segment.global_batch_size)",
        "tests/test_growth.py",
    ),
    "a dropped update moves no statistic": (
        "update.transaction",
        'if step.outcome in ("written", "dropped"):',
        'if step.outcome == "written":',
        "tests/test_growth.py",
    ),
    "a resume in the middle of an epoch decides again": (
        "noise.auto_batch",
        "if epoch == 0 or not first or done:",
        "if epoch == 0 or done:",
        "tests/test_auto_batch.py",
    ),
    "recompute with the spoilt list": (
        "update.checkpointing",
        "return plain(module, *_fresh(args), **_fresh(kwargs))",
        "return plain(module, *args, **kwargs)",
        "tests/test_checkpointing.py",
    ),
    "masks of the learning rate: warmup forgotten": (
        "optim.schedules",
        "if samples_seen < warmup_samples:\n            if",
        "if False:\n            if",
        "tests/test_schedules.py",
    ),
    "order depends on the rank": (
        "data.loader",
        "start + micro_batch.start,",
        "start + micro_batch.start + self.rank,",
        "tests/data/test_loader.py",
    ),
    "augmentation keyed without the epoch": (
        "data.loader",
        "keyed_hash(self.seed, SAMPLE_SEED, epoch, index)",
        "keyed_hash(self.seed, SAMPLE_SEED, index)",
        "tests/data/test_loader.py",
    ),
    "mixup across the cut": (
        "data.augment",
        "torch.arange(start + size - 1, start - 1, -1)",
        "torch.arange(len(labels) - 1 - start, len(labels) - 1 - start - size, -1)",
        "tests/data/test_augment.py",
    ),
    "accumulation steps that are not the plan's are taken": (
        "configs.against_plan",
        "if steps != plan.gradient_accumulation_steps:",
        "if False:",
        "tests/test_configs_command.py",
    ),
    "the environment's accumulation steps are not seen": (
        "configs.resolve",
        "with clear_environment(), patch_environment(**variables):",
        "with clear_environment():",
        "tests/test_resolve.py",
    ),
    "accelerate may replace the optimizer under offload": (
        "configs.make",
        '"zero_force_ds_cpu_optimizer": False',
        '"zero_force_ds_cpu_optimizer": True',
        "tests/test_resolve.py",
    ),
    "a hidden size is asked of a timm model": (
        "configs.make",
        '"stage3_prefetch_bucket_size": BUCKET',
        '"stage3_prefetch_bucket_size": "auto"',
        "tests/test_resolve.py",
    ),
    "the noise scale forgets that an epoch draws without replacement": (
        "noise.arithmetic",
        "scale_s / num_samples * (1 - repeat * share)",
        "scale_s / num_samples",
        "tests/test_noise_arithmetic.py",
    ),
    "the noise scale's units all weigh their samples": (
        "noise.scale",
        "factor, update_sq = num_samples**3 / weight, grad_norm**2",
        "factor, update_sq = num_samples**2, grad_norm**2",
        "tests/test_noise_scale.py",
    ),
    "a loss scale enters the noise scale": (
        "noise.scale",
        "        if self._scale is not None:\n",
        "        if False:\n",
        "tests/test_noise_scale.py",
    ),
    "a filler is a unit of the noise scale": (
        "noise.scale",
        "(not isinstance(weight, Tensor) and weight == 0.0)",
        "(weight := weight or 3.0) == 0.0",
        "tests/test_noise_scale.py",
    ),
    "AdaScale takes the sum for the mean": (
        "optim.adascale",
        "num_units * mean_sq) / (num_units - 1)",
        "mean_sq / num_units) / (num_units - 1)",
        "tests/test_adascale.py",
    ),
    "a dropped update moves AdaScale's progress": (
        "optim.scheduler",
        "if dropped and isinstance(scheduler, AdaScaleLR):",
        "if False:",
        "tests/test_adascale.py::test_a_dropped_update_moves_no_progress_and_takes_its_samples",
    ),
    "a second prepare replaces the first model": (
        "update.engine",
        "            raise failures.prepared_before()\n",
        "            pass\n",
        "tests/test_engine.py::"
        "test_a_second_prepare_is_refused_with_what_to_do_and_the_first_model_goes_on",
    ),
    "the user's random state is moved": (
        "data.loader",
        "generator.set_state(state[0])",
        "pass",
        "tests/data/test_loader.py",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path):
    module, right, naive, tests = MUTANTS[name]
    shutil.copytree(ROOT / "lbaccel", tmp_path / "lbaccel")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    for folder in ("accelerate_configs", "ds_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path.joinpath("lbaccel", *module.split(".")).with_suffix(".py")
    source = path.read_text()
    assert source.count(right) >= 1, f"{module} no longer holds {right!r}"
    path.write_text(source.replace(right, naive, 1))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    noticed = done.returncode == 1 or done.returncode < 0  # some crash torch's autograd
    assert noticed, f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}"
