"""Each trap's naive line, put back into a copy of the package, must fail a test that passes there.

All runs of pytest fork from one server a worker (`pytest_server.py`): torch is imported once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from pytest_server import TIMED_OUT, PytestServer

ROOT = Path(__file__).parent.parent

# name: (module, the line that is right, the naive line, the test that must notice)
MUTANTS = {
    "BatchNorm over the whole batch forgets that its statistics depend on each sample": (
        "update.global_norm.passes",
        "for layer in (layer for read, layer in layers if read == value):",
        "for layer in ():",
        "tests/update/global_norm/test_global_norm.py::"
        "test_an_update_is_that_of_the_full_batch[resnet18-12-False]",
    ),
    "of two BatchNorm layers on one input the second is forgotten": (
        "update.global_norm.passes",
        "layers = [(call.inputs[0], call.layer) for call in tape.layers_at(level)]",
        "layers = list({call.inputs[0]: call.layer for call in tape.layers_at(level)}.items())",
        "tests/update/global_norm/test_global_norm.py::"
        "test_branches_shared_inputs_and_writes_in_place[4-options0]",
    ),
    "a pass draws other masks than the first one": (
        "randomness.masks",
        "        if self._next >= 0:",
        "        if False:",
        "tests/update/global_norm/test_global_norm.py::"
        "test_masks_weights_and_sums_are_those_of_one_ghost_batch_of_all_samples[6]",
    ),
    "a pass writes into a value that is read again": (
        "update.global_norm.tape",
        "return born[value] < call.level or died.get(value, 0) > call.level",
        "return False",
        "tests/update/global_norm/test_global_norm.py::"
        "test_branches_shared_inputs_and_writes_in_place[4-options0]",
    ),
    "a filler moves the statistics of the whole batch": (
        "update.global_norm.passes",
        "one.add_none(values[call.inputs[0]])",
        "one.add(values[call.inputs[0]])",
        "tests/update/global_norm/test_global_norm.py::"
        "test_a_rank_with_a_filler_alone_takes_part_and_counts_nothing",
    ),
    "a filler's backward counts in the passes": (
        "update.global_norm.passes",
        "if level == tape.depth or not part.micro_batch.is_filler:",
        "if True:",
        "tests/update/global_norm/test_global_norm.py::"
        "test_a_rank_with_a_filler_alone_takes_part_and_counts_nothing",
    ),
    "a Function of the user's own has no gradient in the passes": (
        "update.global_norm.recording",
        "            check_graph(x)",
        "            pass",
        "tests/update/global_norm/test_attempts.py::"
        "test_a_forward_that_passes_cannot_repeat_is_named[apply-CustomBackward is a backward of "
        "an autograd.Function]",
    ),
    "a gap of levels takes the gradients of its first level alone": (
        "update.global_norm.schedule",
        "forward, gradients = max(forward, keeps), max(gradients, chain.gradients[b])",
        "forward, gradients = max(forward, keeps), gradients",
        "tests/update/global_norm/test_schedule.py::"
        "test_the_bytes_are_those_of_the_passes_to_a_gradients_share",
    ),
    "an offload moves weights and their views": (
        "update.offload",
        "if address in stays or _is_weight(tensor) or not",
        "if not",
        "tests/update/test_offload.py::test_weights_their_views_and_their_casts_stay[False-fp32]",
    ),
    "an offload moves the casts that autocast holds": (
        "update.offload",
        "    return cast and before is not None",
        "    return False and before is not None",
        "tests/update/test_offload.py::test_weights_their_views_and_their_casts_stay[False-bf16]",
    ),
    "an offload copies a tensor once for each who saves it": (
        "update.offload",
        "kept = self._kept.get(key)",
        "kept = None",
        "tests/update/test_offload.py::"
        "test_a_tensor_that_two_modules_save_is_copied_once_and_comes_back_once[False]",
    ),
    "an offload brings a tensor back once for each who saved it": (
        "update.offload",
        "self._back = flat if self.waiting > 0 else None",
        "self._back = None",
        "tests/update/test_offload.py::"
        "test_a_tensor_that_two_modules_save_is_copied_once_and_comes_back_once[False]",
    ),
    "an offload shares the copy of what was written since": (
        "update.offload",
        "key = address, tensor._version, tensor.dtype",
        "key = address, tensor.dtype",
        "tests/update/test_offload.py::"
        "test_a_tensor_that_is_written_between_two_saves_is_copied_twice",
    ),
    "an offload gives up offsets": (
        "update.offload",
        ".as_strided(self.sizes, self.strides, self.offset)",
        ".as_strided(self.sizes, self.strides, 0)",
        "tests/update/test_offload.py::test_a_saved_tensor_comes_back_with_its_strides_and_offset",
    ),
    "behind an offload's hooks no version is checked": (
        "update.offload",
        "        if now != self.version:",
        "        if False:",
        "tests/update/test_offload.py::"
        "test_a_kept_tensor_that_is_written_before_backward_is_an_error_as_in_plain_torch",
    ),
    "an offload copies the input of a run, which stays on the device anyway": (
        "update.offload",
        "        if begins:",
        "        if False:",
        "tests/update/test_offload.py::"
        "test_nothing_large_is_left_on_the_device_but_the_ends_of_a_run",
    ),
    "the input of an offloaded segment stays": (
        "update.offload",
        "begins and not starts_segment(module)",
        "begins",
        "tests/update/test_offload.py::test_segments_and_offload_together_stay_to_the_bit",
    ),
    "an offload never uses a buffer of the host again": (
        "update.offload",
        "            self._store.release(self._kept)",
        "            pass",
        "tests/update/test_offload.py::test_a_graph_that_is_dropped_gives_its_buffers_back",
    ),
    "an offload's copies take no time": (
        "planning.cost.time_model",
        "return kernel.num_bytes / device.host_bandwidth",
        "return 0.0",
        "tests/planning/test_plan_with_offload.py::"
        "test_a_copy_takes_the_seconds_of_the_cards_link_and_nothing_hides_it",
    ),
    "a plan sends more to the host than the host has": (
        "planning.segments",
        "fitting = fitting[front.host[fitting] + host <= room]",
        "pass",
        "tests/planning/test_segments.py::"
        "test_the_best_parts_are_those_of_brute_force_within_both_memories",
    ),
    "what the modules of an offloaded run hand on costs nothing": (
        "planning.segments",
        "sent += unit.sent + (unit.sent_input if last > at else 0)",
        "sent += unit.sent",
        "tests/planning/test_segments.py::"
        "test_the_best_parts_are_those_of_brute_force_within_both_memories",
    ),
    "BatchNorm over tokens needs a graph in the first pass of a coupled loss": (
        "update.ghost_layers",
        "if slot.rows_of_samples or not torch.is_grad_enabled():",
        "if slot.rows_of_samples:",
        "tests/update/test_coupled_parts.py::"
        "test_batch_norm_over_tokens_runs_in_the_pass_without_a_graph_too",
    ),
    "a coupled loss's temperature counts once a rank": (
        "update.coupled",
        "counts=rank == 0)",
        "counts=True)",
        "tests/update/test_coupled_ranks.py::"
        "test_several_ranks_give_the_update_of_the_whole_batch[2]",
    ),
    "the first pass of a coupled loss moves BatchNorm's statistics too": (
        "update.normalization",
        "with self.forward(micro_batch), self.backward():",
        "with self.forward(micro_batch):",
        "tests/update/test_coupled.py::"
        "test_ghost_batch_norm_and_dropout_are_those_of_the_whole_batch[clip-3-False]",
    ),
    "the first pass of a coupled loss draws other masks than the second": (
        "randomness.masks",
        "        return self.forward(micro_batch)",
        "        return self.forward(MicroBatch(0, micro_batch.group_sizes))",
        "tests/update/test_coupled.py::"
        "test_ghost_batch_norm_and_dropout_are_those_of_the_whole_batch[clip-3-False]",
    ),
    "rows of a coupled loss come in the reverse order of the ranks": (
        "update.embeddings",
        "zip(parts, counts, strict=True)",
        "zip(parts[::-1], counts[::-1], strict=True)",
        "tests/update/test_coupled_ranks.py::"
        "test_ranks_embed_other_samples_and_see_all_rows_in_the_order_of_the_update",
    ),
    "gradient hooks on a coupled loss's own parameters run twice": (
        "update.coupled",
        "_without_hooks(parameters):",
        "_without_hooks([]):",
        "tests/update/test_coupled_parts.py::test_a_gradient_hook_on_the_temperature_runs_once",
    ),
    "a coupled loss's own average moves once a rank": (
        "update.averages",
        "is_filler=not counts",
        "is_filler=False",
        "tests/update/test_coupled_parts.py::"
        "test_averages_of_network_and_loss_move_once_an_update[2-in place]",
    ),
    "the first pass of a coupled loss counts the averages of the network": (
        "update.averages",
        '            yield\n            self._look("forward")',
        '            yield\n            self._look("forward")\n            self._take()',
        "tests/update/test_coupled_parts.py::"
        "test_averages_of_network_and_loss_move_once_an_update[1-in place]",
    ),
    "noise in a coupled loss is drawn by the rank's micro-batches": (
        "randomness.masks",
        "        seed_generators(int(keyed_hash(self.seed, WHOLE, self._update)), self.device)\n",
        "",
        "tests/update/test_coupled_parts.py::test_a_loss_draws_alike_under_every_plan",
    ),
    "a crop's row and column are one draw": (
        "data.photographs",
        "draws[RATIOS], draws[TOP], draws[LEFT])",
        "draws[RATIOS], draws[TOP], draws[TOP])",
        "tests/data/test_photographs.py::"
        "test_an_image_is_that_of_timms_transform_at_the_same_draws[0.0-bilinear]",
    ),
    "contrast takes the factor of brightness": (
        "data.photographs",
        "for what in (BRIGHTNESS, CONTRAST, SATURATION)]",
        "for what in (BRIGHTNESS, BRIGHTNESS, SATURATION)]",
        "tests/data/test_photographs.py::"
        "test_an_image_is_that_of_timms_transform_at_the_same_draws[0.4-bilinear]",
    ),
    "a photograph is mirrored before its box is cut out": (
        "data.photographs",
        "            return ResizedBox(self.box(draws, height, width), (size, size))",
        "            box = self.box(draws, height, width)\n"
        "            if draws[FLIP] < self.flip:\n"
        "                box = box._replace(left=width - box.width - box.left)\n"
        "            return ResizedBox(box, (size, size))",
        "tests/data/test_photographs.py::"
        "test_an_image_is_that_of_timms_transform_at_the_same_draws[0.0-bilinear]",
    ),
    "a photograph has the same draws in each epoch": (
        "data.photographs",
        "keyed_uniform(self.seed, epochs[:, None], indices[:, None], kinds)",
        "keyed_uniform(self.seed, 0, indices[:, None], kinds)",
        "tests/data/test_photographs.py::test_another_epoch_seed_or_sample_has_other_draws",
    ),
    "photographs share a draw with CutMix": (
        "data.photographs",
        "FIRST_DRAW = BOX_X + 1",
        "FIRST_DRAW = BOX_X",
        "tests/data/test_photographs.py::test_no_two_kinds_of_draw_are_one",
    ),
    "erased boxes are filled from the process's generator": (
        "data.photographs",
        "noise.normal_(generator=torch.Generator().manual_seed(key))",
        "noise.normal_()",
        "tests/data/test_photographs.py::test_the_generators_of_the_process_are_not_touched",
    ),
    "contrast turns around grey and not around the image's mean": (
        "data.colour",
        "mean = (2 * total + towards.numel()) // (2 * towards.numel())",
        "mean = 128",
        "tests/data/test_colour.py::test_jitter_has_pillows_numbers",
    ),
    "colours are rounded only at the end": (
        "data.colour",
        "        image.floor_()\n",
        "",
        "tests/data/test_colour.py::test_jitter_has_pillows_numbers",
    ),
    "a photograph that was taken sideways stays so where torchvision decodes it": (
        "data.decode",
        "orientation = _orientation(header) if upright else 1",
        "orientation = 1",
        "tests/data/test_decode.py::test_every_kind_has_the_pixels_that_pillow_gives",
    ),
    "a draft is decoded for the picture, and not for the crop": (
        "data.draft",
        "if part.box.height // d >= height and part.box.width // d >= width)",
        "if d * d * height * width <= part.box.height * part.box.width)",
        "tests/data/test_draft.py::test_the_shorter_side_decides",
    ),
    "a part of a draft is stretched to whole pixels": (
        "data.draft",
        "math.nextafter(of_result * d / length, math.inf)",
        "of_result / num_pixels",
        "tests/data/test_draft.py::test_a_side_is_moved_by_less_than_a_pixel_and_not_stretched",
    ),
    "a part of a draft loses a pixel to the rounding of its scale": (
        "data.draft",
        "math.nextafter(of_result * d / length, math.inf)",
        "of_result * d / length",
        "tests/data/test_draft.py::test_the_rounding_of_a_scale_loses_no_pixel",
    ),
    "a draft that was turned round is cut from its other end": (
        "data.draft",
        "left = width - left - w if 2 in flipped else left",
        "left = left",
        "tests/data/test_draft.py::test_a_box_as_it_is_stored_holds_the_pixels_of_the_upright_one",
    ),
    "a draft that lies on its side is resized as if it stood": (
        "data.draft",
        "size[::-1] if swapped else size",
        "size",
        "tests/data/test_draft.py::test_a_part_at_the_last_edge_is_where_it_is[6]",
    ),
    "the crop of a draft is drawn in a picture that lies on its side": (
        "data.draft",
        "picture.size[::-1] if swapped else picture.size",
        "picture.size",
        "tests/data/test_draft.py::test_a_crop_shows_the_same_part_under_each_decoder[6]",
    ),
    "a draft of one crop is kept for all": (
        "data.photographs",
        "        check_kept(draft=self.draft, cache=self.cache)\n",
        "",
        "tests/data/test_draft.py::test_images_are_not_kept_beside_it",
    ),
    "a file alone is decoded in its whole size": (
        "data.pipelines",
        "    if decoder_in(preprocessing) == DRAFT:  # it must",
        "    if False:  # it must",
        "tests/data/test_draft.py::test_evaluation_and_one_file_alone_see_the_same_pixels",
    ),
    "an image is shown to others before its pixels are written": (
        "data.pixel_cache",
        "self._index[index, 0] = _BEING_WRITTEN",
        "self._index[index] = torch.tensor([place + 1, *pixels.shape[1:]])",
        "tests/data/test_pixel_cache.py::test_an_image_whose_writer_was_killed_counts_as_absent",
    ),
    "two processes take one place of the cache": (
        "data.pixel_cache",
        "        with self.memory.locked():\n            place = int(self._used)",
        "        if True:\n            place = int(self._used)",
        "tests/data/test_pixel_cache.py::test_two_processes_never_take_the_same_place",
    ),
    "more images are kept than there is memory for": (
        "data.pixel_cache",
        "place + size > len(self._images)",
        "place > len(self._images)",
        "tests/data/test_pixel_cache.py::"
        "test_what_is_kept_never_has_more_bytes_than_it_was_given_and_stays",
    ),
    "validation images are taken for training images": (
        "data.pixel_cache",
        "self.cache.pixels(self.first + index, decode)",
        "self.cache.pixels(index, decode)",
        "tests/data/test_pixel_cache.py::test_validation_images_are_not_taken_for_training_images",
    ),
    "a lock that processes inherit keeps none of them out": (
        "data.shared_bytes",
        "            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)",
        "            fcntl.flock(self._fd, fcntl.LOCK_EX)",
        "tests/data/test_pixel_cache.py::test_two_processes_never_take_the_same_place",
    ),
    "each rank of a machine keeps images for itself": (
        "recipe.kept_images",
        "lambda: made or PixelCache.of(SharedBytes.at(first), num_images)",
        "lambda: made or _made(asked, num_images)",
        "tests/recipe/test_kept_images.py::"
        "test_the_ranks_of_a_machine_share_one_cache_and_machines_do_not",
    ),
    "a resume can't end to keep images": (
        "recipe.options_data",
        """        shown="none are kept",
        contract=False,
""",
        """        shown="none are kept",
""",
        "tests/recipe/test_kept_images.py::test_a_resume_may_begin_and_end_to_keep_images",
    ),
    "a batch is written over while it is read": (
        "data.slots",
        "if not busy[number]:",
        "if True:",
        "tests/data/test_slots.py::test_no_batch_is_written_over_while_it_is_read[1]",
    ),
    "a batch that can't be read keeps its slot": (
        "data.slots",
        "        slots.free(slot)\n        raise",
        "        raise",
        "tests/data/test_slots.py::test_a_batch_that_fails_gives_its_slot_back",
    ),
    "a batch beside pinned labels is not opened": (
        "data.slots",
        "isinstance(data, (tuple, list)) and data",
        "isinstance(data, tuple) and data",
        "tests/data/test_slots.py::"
        "test_the_main_process_opens_a_batch_and_gives_the_slot_back_after_it[list]",
    ),
    "a batch that the caller has still is written over": (
        "data.reused",
        "(block, weakref.ref(array))]",
        "(block, lambda: None)]",
        "tests/data/test_photographs.py::test_a_batch_that_the_caller_has_stays_as_it_is",
    ),
    "the memory of a batch is free when its tensor is gone, and not its views": (
        "data.reused",
        """            self._blocks = [*kept, (block, weakref.ref(array))]
            return torch.from_numpy(array).view(shape)
""",
        """            tensor = torch.from_numpy(array).view(shape)
            self._blocks = [*kept, (block, weakref.ref(tensor))]
            return tensor
""",
        "tests/data/test_reused.py::test_no_living_tensor_is_written_over",
    ),
    "the memory of a large batch is held for small ones": (
        "data.reused",
        "if length <= len(pair[0]) <= 2 * length]",
        "if length <= len(pair[0])]",
        "tests/data/test_reused.py::test_no_more_is_held_than_twice_what_is_asked_for",
    ),
    "batches of an evaluation that was left keep their slots": (
        "data.passes",
        "            deque(self._opened(), maxlen=0)\n",
        "            pass\n",
        "tests/data/test_passes.py::test_a_pass_that_is_left_leaves_its_slots_free_and_its_workers",
    ),
    "the batch at which an evaluation was left keeps its slot": (
        "data.slots",
        """            try:
                yield self._bytes(slot), *data[1:]
            finally:  # also where the pass is left here
                self.free(slot)
""",
        """            yield self._bytes(slot), *data[1:]
            self.free(slot)
""",
        "tests/data/test_passes.py::test_a_pass_that_is_left_leaves_its_slots_free_and_its_workers",
    ),
    "new workers have the slots of those that are gone": (
        "data.passes",
        "self._slots = self._new_slots()  # none",
        "self._slots = self._slots or self._new_slots()  # none",
        "tests/data/test_passes.py::test_after_the_end_others_start",
    ),
    "the workers of an evaluation go on with the rows of the pass before": (
        "data.passes",
        "self._asked[:] = batches",
        "self._asked = list(batches)",
        "tests/data/test_photographs.py::"
        "test_the_workers_of_an_evaluation_stay_and_a_pass_that_was_left_leaves_nothing",
    ),
    "a run of before the decoders goes on with the fast one": (
        "recipe.options_data",
        '        before="pillow",',
        "        before=None,",
        "tests/recipe/test_older_runs.py::test_the_list_is_the_table_s",
    ),
    "a schedule that the user steps as well runs twice as fast": (
        "update.plain_loop",
        "if count is not None and self._moved is not None and count > self._moved:",
        "if False:",
        "tests/update/test_plain_loop.py::"
        "test_the_users_own_scheduler_step_is_noticed_at_the_next_update",
    ),
    "a landscape of weights moves BatchNorm's running statistics": (
        "landscape.directions",
        "    if direction == STATES:",
        "    if True:",
        "tests/landscape/test_directions.py::"
        "test_weights_are_the_parameters_and_states_the_running_statistics_too",
    ),
    "a direction has the norm of each layer and not of each filter": (
        "landscape.directions",
        "(lambda t: t.flatten(1).norm(dim=1))",
        "(lambda t: t.norm().expand(len(t)))",
        "tests/landscape/test_directions.py::"
        "test_each_filter_of_the_direction_has_the_norm_of_the_weights_filter",
    ),
    "a landscape is drawn in training mode": (
        "landscape.network",
        "copy.deepcopy(model).eval().requires_grad_(False)",
        "copy.deepcopy(model).requires_grad_(False)",
        "tests/landscape/test_surface.py::"
        "test_a_network_in_training_mode_has_the_surface_of_its_evaluation",
    ),
    "BatchNorm is merged although a shortcut reads the convolution too": (
        "landscape.network",
        "if truth.shape == found.shape and bool(",
        "if True or bool(",
        "tests/landscape/test_surface.py::"
        "test_batchnorm_is_not_merged_where_something_else_reads_the_convolution",
    ),
    "the end of a line between two models is the second one up to rounding": (
        "landscape.surface",
        "torch.lerp(start, along, x) if self.between",
        "start + x * (along - start) if self.between",
        "tests/landscape/test_surface.py::"
        "test_the_ends_of_a_line_between_two_models_are_both_models_to_the_bit",
    ),
    "points of another landscape are taken for this one's": (
        "landscape.folder",
        "    other = [name for name, now in identity.items() if before[name] != now]",
        "    other: list[str] = []",
        "tests/landscape/test_landscape.py::"
        "test_another_landscape_in_the_folder_is_refused_and_stays",
    ),
    "each rank computes all points of a landscape": (
        "landscape.landscape",
        "mine = missing[accelerator.process_index :: world_size]",
        "mine = missing",
        "tests/landscape/test_landscape.py::"
        "test_ranks_divide_the_points_and_their_surface_is_that_of_one_process",
    ),
    "copies of an eigenvalue stand for further ones": (
        "stability.eigenvalues",
        "    for _ in range(2):",
        "    for _ in range(0):",
        "tests/stability/test_eigenvalues.py::"
        "test_no_copy_of_an_eigenvalue_appears_where_many_products_are_made_in_float32",
    ),
    "Keskar's search begins at a minimum, where the gradient is zero, and nowhere else": (
        "landscape.box",
        "for start in (x, x + reach * drawn):",
        "for start in (x,):",
        "tests/landscape/test_sharpness.py::"
        "test_keskars_measure_of_a_separable_quadratic_is_the_far_corner_of_the_box[True]",
    ),
    "sharpness moves the model itself": (
        "landscape.mean_loss",
        "own = copy.deepcopy(model).eval().to(device)",
        "own = model.eval().to(device)",
        "tests/landscape/test_sharpness.py::test_nothing_of_the_model_moves",
    ),
    "a hint names flags that the command does not have": (
        "recipe.other_names",
        "return row if row is not None and row.needs <= set(known) else None",
        "return row",
        "tests/recipe/test_other_names.py::"
        "test_a_hint_is_given_only_where_the_command_has_its_flags",
    ),
    "the rate of timm is taken for the rate at 256 samples": (
        "recipe.other_names",
        '    "lr": differs(_RATE),',
        '    "lr": same("--base-lr"),',
        "tests/recipe/test_other_names.py::test_the_difference_is_said_in_numbers",
    ),
    "a checkpoint forgets the arguments of its network": (
        "runs.saved_weights",
        'pre["model"], **sizes, arguments=arguments, described=described',
        'pre["model"], **sizes',
        "tests/recipe/test_model_arguments.py::"
        "test_a_checkpoint_and_a_run_are_built_again_with_them",
    ),
    "the line that runs a run again leaves the network's own arguments out": (
        "studies.provenance",
        'words, config = ["lbaccel", "train"], joined(config)',
        'words = ["lbaccel", "train"]',
        "tests/studies/test_provenance.py::"
        "test_the_line_read_again_has_the_settings_of_the_experiment",
    ),
    "a line is drawn between two networks of other arguments": (
        "landscape.request",
        "ARGUMENTS: own, ",
        "",
        "tests/landscape/test_request.py::"
        "test_two_networks_of_other_arguments_and_equal_shapes_have_no_line",
    ),
    "a summary that is too deep ends the whole report": (
        "studies.folder",
        "except (Malformed, OutOfBounds):",
        "except Malformed:",
        "tests/studies/test_results.py::test_files_out_of_bounds_are_read_as_damaged_ones",
    ),
    "a damaged choice of the grid ends the whole report": (
        "studies.folder",
        "return [one for one in found if _is_choice(one)] if",
        "return found if",
        "tests/studies/test_results.py::test_a_damaged_choice_of_the_grid_is_left_out",
    ),
    "the noise scale at the target is one of those that a page shows": (
        "studies.one_run",
        "return [[_number(value) for value in row] for row in found]",
        "return thinned([[_number(value) for value in row] for row in found], MOST_POINTS)",
        "tests/studies/test_results.py::"
        "test_the_noise_scale_at_the_target_is_the_last_reading_before_it",
    ),
    "a setting that one arm alone states is equal in all runs before they begin": (
        "studies.settings_of_runs",
        "whole = _with_defaults(one.cell.settings, stated)",
        "whole = dict(one.cell.settings)",
        "tests/studies/test_results.py::"
        "test_before_its_runs_an_arm_has_the_default_of_what_another_arm_states",
    ),
    "a table of predictions of any size is read": (
        "studies.on_images",
        "text_of(path, most=MOST_TABLE_BYTES)",
        'path.read_text(encoding="utf-8")',
        "tests/studies/test_results.py::test_a_table_of_predictions_is_read_within_a_bound",
    ),
    "a resume towards another target forgets the evaluations of before": (
        "runs.target",
        'in state["seen"].items()}',
        "in {}.items()}",
        "tests/runs/test_target.py::"
        "test_a_resume_towards_another_target_knows_the_evaluations_of_before",
    ),
    "a network of any size is built": (
        "network_build",
        "    if 4 * values > free:",
        "    if False:",
        "tests/test_network_arguments.py::"
        "test_a_network_that_does_not_fit_into_memory_is_a_sentence_with_the_numbers",
    ),
    "a checkpoint builds its network of other arguments twice on the meta device": (
        "runs.saved_weights",
        ", described=described",
        "",
        "tests/recipe/test_model_arguments.py::test_a_checkpoint_tries_its_arguments_once",
    ),
    "a list in the network's arguments is another value than the tuple that was typed": (
        "network_arguments",
        "        return tuple(_plain(item, where, depth=depth + 1) for item in value)",
        "        return value",
        "tests/test_network_arguments.py::test_words_yaml_and_json_give_the_same_arguments",
    ),
    "a part of the images is the first of them": (
        "data.subset",
        "sorted(members[label], key=lambda position: (keys[position], position))[:share]",
        "members[label][:share]",
        "tests/data/test_subset.py::test_a_draw_depends_on_names_alone",
    ),
    "a run decodes the test set that it never looks at": (
        "recipe.images",
        "lambda: open_data(data, seed=seed, decodes_test=False))",
        "lambda: open_data(data, seed=seed))",
        "tests/data/test_subset.py::test_training_leaves_the_test_set_of_parquet_files_undecoded",
    ),
    "a run on a part of the images is judged on all of them": (
        "product.judged",
        "if source is not None and differences(source, trained.settings.identity) is None:",
        "if False:",
        "tests/recipe/test_max_samples.py::test_eval_gives_the_run_s_own_number_to_the_bit",
    ),
    "a value of a flag that looks like key=value becomes a setting": (
        "recipe.command_line",
        "values = 0 if has_value or action is None else _values_of(action)",
        "values = 0",
        "tests/recipe/test_other_names.py::test_a_word_that_a_flag_takes_stays_its_value",
    ),
    "a guess is made at half a likeness": (
        "recipe.values",
        "_NEAR = 0.8 ",
        "_NEAR = 0.6 ",
        "tests/recipe/test_other_names.py::test_a_word_of_another_world_gets_no_guess",
    ),
    "what an earlier file asked for stays asked for": (
        "recipe.settings",
        "given=(below.given - {*options, *added}) | asked",
        "given=below.given | asked",
        "tests/recipe/test_settings.py::test_a_later_file_takes_back_what_one_before_asked_for",
    ),
    "a secret under a harmless name is shown": (
        "runs.bug_report",
        " or _RANDOM.fullmatch(text)",
        "",
        "tests/runs/test_bug_report.py::test_no_key_no_token_no_password_no_user_is_shown",
    ),
    "going back to an older state counts as the user's step": (
        "update.plain_loop",
        "count > self._moved:",
        "count != self._moved:",
        "tests/update/test_plain_loop.py::test_going_to_a_saved_state_is_no_step_of_the_users",
    ),
    "a loaded state that is ahead counts as the user's step": (
        "update.plain_loop",
        "self._moved, self._accumulated = None, self._accelerator.step",
        "pass",
        "tests/update/test_plain_loop.py::test_going_to_a_saved_state_is_no_step_of_the_users",
    ),
    "the user's own optimizer step writes": (
        "update.plain_loop",
        "    if guard is None or guard._stepping:\n",
        "    if True:\n",
        "tests/update/test_plain_loop.py::"
        "test_the_users_own_optimizer_step_is_refused_before_it_writes",
    ),
    "accumulate around an update is passed over": (
        "update.plain_loop",
        "if self._accelerator.step != self._accumulated or not self._accelerator.sync_gradients:",
        "if False:",
        "tests/update/test_plain_loop.py::"
        "test_a_number_of_accumulation_steps_that_is_set_later_does_not_swallow_the_step",
    ),
    "a schedule of another optimizer never moves this one": (
        "update.arguments",
        "and moves.param_groups is not optimizer.param_groups:",
        "and False:",
        "tests/update/test_arguments.py::"
        "test_other_objects_to_prepare_are_one_sentence_and_leave_it_ready[a scheduler of another]",
    ),
    "an optimizer of a copy moves nothing": (
        "update.arguments",
        "    if not foreign:\n",
        "    if True:\n",
        "tests/update/test_arguments.py::"
        "test_other_objects_to_prepare_are_one_sentence_and_leave_it_ready[an optimizer of a copy]",
    ),
    "BatchNorm left in eval mode takes no statistic": (
        "update.arguments",
        "or any(m.training for m in norm.layers):",
        "or True:",
        "tests/update/test_arguments.py::"
        "test_a_model_left_in_eval_mode_by_an_evaluation_is_one_sentence",
    ),
    "an update made by hand is scaled by samples that it does not hold": (
        "update.arguments",
        "    if not agreement.own_weights and agreement.weight != update.num_samples:\n",
        "    if False:\n",
        "tests/update/test_arguments.py::"
        "test_an_update_made_by_hand_says_how_many_samples_it_holds",
    ),
    "a loader of another plan is passed over": (
        "update.arguments",
        "        if here != there:\n",
        "        if False:\n",
        "tests/update/test_arguments.py::test_a_loader_of_another_plan_is_refused",
    ),
    "an update of two micro-batches is taken apart into images and labels": (
        "data.loader",
        "if is_unpacking(sys._getframe(1)):",
        "if False:",
        "tests/data/test_as_data_loader.py::test_an_old_loop_over_the_loader_is_told_what_to_write",
    ),
    "a ghost batch of rows has as many rows as samples": (
        "update.ghost_layers",
        "sizes = tuple(size * tokens for size in sizes)",
        "sizes = (*sizes[:-1], x.shape[0] - sum(sizes[:-1]))",
        "tests/update/test_ghost_layers.py::test_levit_equals_plain_ghost_batches_in_turn",
    ),
    "rows that lie token by token are cut as if they lay sample by sample": (
        "update.ghost_layers",
        "return tokens if before[:1] == (num_samples,) and before[-1] == x.shape[1] else None",
        "return tokens",
        "tests/update/test_ghost_layers.py::"
        "test_rows_that_are_not_known_to_lie_sample_by_sample_are_refused",
    ),
    "the gradients of the soft targets shrink with the temperature": (
        "update.distillation",
        "return distance * temperature**2",
        "return distance",
        "tests/update/test_distillation.py::"
        "test_its_gradient_is_t_times_the_difference_of_the_probabilities",
    ),
    "the divergence is taken from the network to the teacher": (
        "update.distillation",
        "F.kl_div(ours, theirs,",
        "F.kl_div(theirs, ours,",
        "tests/update/test_distillation.py::"
        "test_it_is_the_divergence_of_the_softened_answers_times_the_squared_temperature",
    ),
    "class weights count in the part of the labels alone": (
        "recipe.loss",
        "mean = _mean(apart, targets, class_weights)",
        "mean = _mean(apart, targets, None)",
        "tests/recipe/test_teacher.py::"
        "test_random_partitions_give_the_loss_and_the_gradient_of_the_whole_batch",
    ),
    "the teacher sees images that are normalised for the student": (
        "recipe.teacher",
        "given = torch.addcmul(self.shift, images, self.scale)",
        "given = images",
        "tests/recipe/test_teacher.py::"
        "test_the_update_of_the_recipe_is_that_of_a_plain_loop_on_the_very_images",
    ),
    "the teacher's answers carry gradients": (
        "recipe.teacher",
        "    @torch.no_grad()\n",
        "",
        "tests/recipe/test_teacher.py::"
        "test_it_answers_without_a_gradient_in_evaluation_mode_under_the_context_of_the_run",
    ),
    "the teacher runs outside of the run's autocast": (
        "recipe.teacher",
        "lambda: autocast(accelerator),",
        "lambda: torch.autocast('cpu', enabled=False),",
        "tests/recipe/test_teacher.py::test_the_teacher_runs_in_the_precision_of_the_run",
    ),
    "a resume takes a teacher of other weights": (
        "recipe.teacher",
        "if before not in (None, digest) and",
        "if False and",
        "tests/recipe/test_teacher.py::"
        "test_a_resume_takes_the_same_teacher_anywhere_and_no_other_weights",
    ),
    "a plan of the recipe forgets the teacher": (
        "recipe.auto_plan",
        "teacher=work.teacher,",
        "teacher=None,",
        "tests/recipe/test_teacher.py::test_an_automatic_micro_batch_counts_the_teacher",
    ),
    "a plan under ZeRO forgets the teacher": (
        "planning.estimate",
        "own |= self._of_teacher",
        "own |= {}",
        "tests/planning/test_plan_with_teacher.py::"
        "test_each_rank_holds_the_whole_teacher_under_zero",
    ),
    "names begin a byte too early": (
        "data.names",
        "ends.append(len(data))",
        "ends.append(len(data) - 1)",
        "tests/data/test_names.py::test_strings_come_back_as_they_were",
    ),
    "a name that is no UTF-8 is lost": (
        "data.names",
        '_CODEC = ("utf-8", "surrogatepass")',
        '_CODEC = ("utf-8", "replace")',
        "tests/data/test_names.py::test_strings_come_back_as_they_were",
    ),
    "a name has the codec of file names, which not every string has": (
        "data.names",
        '_CODEC = ("utf-8", "surrogatepass")',
        '_CODEC = ("utf-8", "surrogateescape")',
        "tests/data/test_names.py::test_strings_come_back_as_they_were",
    ),
    "a part of the names is counted from the start alone": (
        "data.names",
        "if (places < 0).any():",
        "if False:",
        "tests/data/test_names.py::test_all_that_a_tuple_does",
    ),
    "the pickle of a part of the names holds them all": (
        "data.names",
        "return self.take(np.arange(*index.indices(len(self))))",
        "part = Names(()); part._encoded = self._encoded[index]; return part",
        "tests/data/test_names.py::"
        "test_a_copy_is_equal_and_a_pickle_of_a_part_holds_the_part_alone",
    ),
    "the names of files are held twice": (
        "data.images",
        "        if self.samples is self.names:  # one buffer",
        "        if False:  # one buffer",
        "tests/data/test_names.py::"
        "test_a_set_keeps_its_names_so_and_one_buffer_for_names_and_samples",
    ),
    "a hidden image gives its label to the next image": (
        "data.folders",
        """                if "/." not in below:
                    labels.append(label)
                    yield below
""",
        """                labels.append(label)
                if "/." not in below:
                    yield below
""",
        "tests/data/test_sources.py::test_hidden_files_and_other_files_are_passed_over",
    ),
    "an order has no key of its round": (
        "randomness.permutation",
        "rounds = keyed_hash(*key, np.arange(ROUNDS))",
        "rounds = keyed_hash(*key, np.zeros(ROUNDS, int))",
        "tests/randomness/test_permutation.py::test_the_values_are_those_of_the_equation",
    ),
    "an order has a round without a key": (
        "randomness.permutation",
        "left = (left + _below(rows, hashed_on(h, right))) % rows",
        "left = (left + _below(rows, keyed_hash(right))) % rows",
        "tests/randomness/test_permutation.py::test_the_values_are_those_of_the_equation",
    ),
    "an order does not walk its cycles": (
        "randomness.permutation",
        "walking = walking[found[walking] >= size]",
        "walking = walking[:0]",
        "tests/randomness/test_permutation.py::test_each_value_comes_once_at_every_size",
    ),
    "an order is folded where it should walk": (
        "randomness.permutation",
        "found[walking] = left * columns + right",
        "found[walking] = (left * columns + right) % size",
        "tests/randomness/test_permutation.py::test_each_value_comes_once_at_every_size",
    ),
    "an order has the rounds of the proof": (
        "randomness.permutation",
        "ROUNDS = 8",
        "ROUNDS = 4",
        "tests/randomness/test_permutation.py::test_epochs_look_random",
    ),
    "all epochs of a large set have one order": (
        "data.order",
        "keyed_permutation(places, num_samples, seed, _NETWORK, epoch)",
        "keyed_permutation(places, num_samples, seed, _NETWORK)",
        "tests/data/test_order.py::"
        "test_a_state_of_before_keeps_the_first_rule_and_a_new_one_the_second[options2]",
    ),
    "small sets change their order": (
        "data.order",
        "if order == SORTED or num_samples <= MOST_SORTED:",
        "if order == SORTED:",
        "tests/data/test_order.py::test_up_to_the_bound_the_second_rule_is_the_first[1000]",
    ),
    "a run of before goes on in the new order": (
        "data.loader",
        'check_order(state.get("order", SORTED))',
        'check_order(state.get("order", COMPUTED))',
        "tests/runs/test_resume.py::test_a_run_on_a_large_set_keeps_its_rule_of_order_to_the_bit",
    ),
    "a run of before that is resumed twice changes its order": (
        "data.loader",
        '"order": self.order}\n',
        '"order": COMPUTED}\n',
        "tests/runs/test_resume.py::test_a_run_on_a_large_set_keeps_its_rule_of_order_to_the_bit",
    ),
    "copies of images have the new order in a run of before": (
        "data.order",
        "epochs, offsets // repeats, num_samples=num_samples, seed=seed, order=order",
        "epochs, offsets // repeats, num_samples=num_samples, seed=seed, order=COMPUTED",
        "tests/data/test_order.py::"
        "test_a_state_of_before_keeps_the_first_rule_and_a_new_one_the_second[options1]",
    ),
    "the average of a run of before is measured in the new order": (
        "recipe.average",
        "groups.order = self.loader.order",
        "pass",
        "tests/recipe/test_average.py::test_the_groups_are_of_the_order_that_the_run_began_with",
    ),
    "copies of an image are augmented alike": (
        "data.order",
        "return indices, epochs * repeats + copies",
        "return indices, epochs",
        "tests/data/test_repeats.py::"
        "test_copies_of_an_image_in_memory_are_augmented_and_mixed_differently",
    ),
    "copies of an image lie in one ghost batch": (
        "data.order",
        "copies, places = np.divmod(np.arange(start, start + count), -(-size // repeats))",
        "places, copies = np.divmod(np.arange(start, start + count), repeats)",
        "tests/data/test_repeats.py::test_an_epoch_is_that_of_timms_sampler",
    ),
    "the noise is measured between copies of an image": (
        "recipe.measured",
        "if loader.repeats > 1:",
        "if False:",
        "tests/recipe/test_repeats_of_the_recipe.py::"
        "test_a_run_with_copies_depends_on_no_plan_and_ends_the_same_after_a_break",
    ),
    "the checkpoint of the best averaged weights is pruned": (
        "runs.checkpoints",
        "for name in (LAST, BEST, BEST_EMA)}",
        "for name in (LAST, BEST)}",
        "tests/runs/test_log.py::test_the_best_of_each_is_kept_and_named",
    ),
    "a kill before the link of the best averaged weights leaves it behind": (
        "runs.abandoned",
        "((LAST, update), (BEST, best), (BEST_EMA, best_ema))",
        "((LAST, update), (BEST, best))",
        "tests/runs/test_log.py::test_a_kill_before_the_second_link_loses_nothing",
    ),
    "the average is taken from the best checkpoint of the weights": (
        "runs.saved_weights",
        "[*[BEST_EMA] * ema, BEST, LAST]",
        "[BEST, LAST]",
        "tests/runs/test_log.py::test_eval_predict_and_export_take_the_average_of_its_own_best",
    ),
    "an average that is to begin with the first update begins with the initial weights": (
        "recipe.average",
        "self.average.update(model, step=self.num_updates())",
        "self.average.update(model)",
        "tests/recipe/test_average.py::test_the_average_begins_as_timms_does",
    ),
    "the averaged weights keep statistics of other weights": (
        "train",
        "if suffix and t.norm_of_average is not None:",
        "if False:",
        "tests/recipe/test_average.py::"
        "test_the_saved_average_has_the_statistics_of_its_own_weights",
    ),
    "the workers of a measurement of the average outlive it": (
        "recipe.average",
        "with measuring(self.network) as taken, closing(loader):",
        "with measuring(self.network) as taken:",
        "tests/recipe/test_average.py::"
        "test_its_workers_end_with_it_and_are_not_left_to_the_collector",
    ),
    "groups that fill the last round of the ranks count too": (
        "recipe.average",
        "in rows[: self.num_groups - first]:",
        "in rows:",
        "tests/recipe/test_average.py::test_ranks_and_micro_batches_change_no_bit",
    ),
    "a group's statistics are mixed with those of the one before": (
        "update.recalibration",
        "layer.training, layer.momentum = True, None",
        "layer.training = True",
        "tests/update/test_recalibration.py::"
        "test_a_groups_statistics_are_those_of_its_samples_and_the_network_is_as_before",
    ),
    "the length is fitted to the fastest rank": (
        "recipe.fitting",
        "torch.distributed.ReduceOp.MAX",
        "torch.distributed.ReduceOp.MIN",
        "tests/recipe/test_fitting.py::test_all_ranks_take_the_length_of_the_slowest",
    ),
    "a resume measures the length again": (
        "train",
        "if s.rate.max_minutes is not None and resume_from is None:",
        "if s.rate.max_minutes is not None:",
        "tests/recipe/test_fitting.py::test_a_resume_takes_the_length_and_measures_nothing",
    ),
    "the evaluations of a fitted run take no time": (
        "recipe.fitting",
        "updates * of_update + evaluations * of_evaluation",
        "updates * of_update",
        "tests/recipe/test_fitting.py::"
        "test_no_run_that_fits_is_longer_and_the_one_that_is_given_fits",
    ),
    "a seed of more than 64 bits is taken": (
        "errors",
        "if seed is None or not 0 <= seed < 2**64:",
        "if seed is None or seed < 0:",
        "tests/test_errors.py::test_a_seed_that_is_no_whole_number_of_64_bits_is_refused_by_name",
    ),
    "a masks' seed is cut to a whole number": (
        "randomness.masks",
        'check_seed("seed", seed), device',
        "int(seed), device",
        "tests/test_errors.py::test_a_seed_that_is_no_whole_number_of_64_bits_is_refused_by_name",
    ),
    "a scaler hides a loss that is not finite": (
        "update.sharding.replicated",
        "if not finite and (scaler is None or self._all_finite()):",
        "if not finite and scaler is None:",
        "tests/update/test_engine.py::test_a_scaler_does_not_hide_what_it_does_not_look_at",
    ),
    "a scaler keeps its account of a gradient that was not stepped with": (
        "update.sharding.replicated",
        "            scaler.update()\n",
        "            pass\n",
        "tests/update/test_engine.py::test_a_scaler_does_not_hide_what_it_does_not_look_at",
    ),
    "nan times a weight of 0 counts in the loss": (
        "update.weightless",
        "return so_far + torch.where(weight != 0, loss.double() * weight, 0.0)",
        "return so_far + loss.double() * weight",
        "tests/update/test_weightless.py::"
        "test_an_update_with_empty_micro_batches_is_that_of_the_whole_batch",
    ),
    "nan times a weight of 0 counts in the gradient": (
        "update.weightless",
        "return torch.where(self._counts, gradient, gradient.new_zeros(()))",
        "return gradient",
        "tests/update/test_weightless.py::"
        "test_an_update_with_empty_micro_batches_is_that_of_the_whole_batch",
    ),
    "FSDP2 is left without hooks": (
        "update.weightless",
        "                tensor.register_hook(self._gradient)\n",
        "                pass\n",
        "tests/update/test_weightless.py::"
        "test_several_ranks_with_empty_micro_batches_give_the_whole_batch",
    ),
    "the gradient of an empty micro-batch is heard by the noise scale": (
        "noise.unit_norms",
        "self._sums += torch.where(weight > 0, sums, 0.0)",
        "self._sums += (weight > 0) * sums",
        "tests/update/test_weightless.py::test_an_empty_micro_batch_is_no_unit_of_the_noise_scale",
    ),
    "a rank needs a whole group, where a short one will do": (
        "batch.plan",
        "        if groups < self.world_size:\n",
        "        if self.global_batch_size < self.world_size * unit:\n",
        "tests/batch/test_batch.py::"
        "test_ranks_share_as_many_groups_as_there_are_and_the_last_may_be_short",
    ),
    "an alias counts as one value": (
        "documents",
        "count, levels = count + values, max(levels, deeper + 1)",
        "count, levels = count + 1, max(levels, deeper + 1)",
        "tests/test_documents.py::test_a_yaml_without_bounds_is_refused_with_the_figures[aliases]",
    ),
    "a torch file is read before it is walked": (
        "models",
        "            check_torch_file(path)\n",
        "            pass\n",
        "tests/test_torch_files.py::"
        "test_a_pickle_that_allocates_by_itself_is_refused_before_torch_reads_it",
    ),
    "a view may claim more than its file holds": (
        "models",
        "if claimed > max(held, MOST_EXPANDED):",
        "if False:",
        "tests/test_torch_files.py::test_a_view_that_claims_more_than_the_file_holds_is_refused",
    ),
    "a photograph lies as the camera stored it": (
        "data.images",
        "            if exif_orientation:\n",
        "            if False:\n",
        "tests/data/test_images.py::test_all_sets_of_a_folder_are_turned_or_none[True]",
    ),
    "a row's photograph lies as the camera stored it": (
        "data.parquet",
        "        exif_orientation=wanted.exif_orientation,\n",
        "        exif_orientation=False,\n",
        "tests/data/test_images.py::test_all_rows_of_parquet_files_are_turned_or_none[True-True]",
    ),
    "a run of before a setting goes on with its default": (
        "recipe.resume",
        "{**BEFORE, **saved}",
        "saved",
        "tests/recipe/test_older_runs.py::"
        "test_a_run_of_before_goes_on_with_the_images_that_it_began_with",
    ),
    "the test set chooses the checkpoint": (
        "data.folders",
        "(*VAL_FOLDERS, TEST) if wanted.test_split == AS_VAL else VAL_FOLDERS",
        "(*VAL_FOLDERS, TEST)",
        "tests/data/test_folders.py::test_test_without_val_chooses_no_checkpoint",
    ),
    "test-*.parquet chooses the checkpoint": (
        "data.parquet",
        "            if test and not val and test_split == AS_VAL:\n",
        "            if test and not val:\n",
        "tests/data/test_folders.py::test_parquet_without_validation_leaves_the_test_set_alone",
    ),
    "a JPEG that is cut off is believed": (
        "data.broken",
        '"JPEG": lambda size, head, tail: b"\\xff\\xd9" in tail,',
        '"JPEG": lambda size, head, tail: True,',
        "tests/data/test_broken.py::test_a_look_finds_one_whose_end_is_missing[.jpg]",
    ),
    "rows of parquet files are known by a name that several have": (
        "data.broken",
        "        return [_name(images, images.read, row) for row in range(len(images))]",
        "        return list(images.names)",
        "tests/data/test_broken.py::"
        "test_images_in_no_files_of_their_own_are_looked_at[in_rows-True]",
    ),
    "a look at rows keeps their bytes": (
        "data.broken",
        "copy.copy(images.read)",
        "images.read",
        "tests/data/test_broken.py::test_a_look_leaves_nothing_in_the_memory_of_the_reader",
    ),
    "a resume reads all files again": (
        "recipe.images",
        "        if kept is not None:\n",
        "        if False:\n",
        "tests/recipe/test_sound_images.py::test_a_resume_takes_the_list_and_reads_no_file_anew",
    ),
    "memory that is collected locks a file that is closed": (
        "data.shared_bytes",
        "            is_open = bool(self._open)",
        "            is_open = True",
        "tests/data/test_slots.py::test_a_pass_that_is_collected_with_its_memory_is_no_failure",
    ),
    "a crop's rows and columns are interchanged": (
        "data.augment",
        "windows[np.arange(len(images)), :, top, left]",
        "windows[np.arange(len(images)), :, left, top]",
        "tests/data/test_augment.py::test_the_frame_of_a_crop_is_padded_as_numpy_does",
    ),
    "a mirrored image is written into the set": (
        "data.augment",
        "images = self.source.images.index_select(0, rows)",
        "images = self.source.images",
        "tests/data/test_augment.py::test_the_set_itself_is_left_as_it_is",
    ),
    "a reflection repeats the border": (
        "data.augment",
        "(last - (last - places.abs()).abs())",
        "(last - (last - (places + (places < 0)).abs()).abs())",
        "tests/data/test_augment.py::test_the_frame_of_a_crop_is_padded_as_numpy_does[reflect-numpys2]",
    ),
    "a link that leads back is followed": (
        "data.folders",
        "if (this := _identity(path)) in above:",
        "if (this := _identity(path)) in ():",
        "tests/data/test_bounds.py::test_a_link_that_leads_back_is_refused_and_named",
    ),
    "only a parquet file's own figures are believed": (
        "data.parquet_bounds",
        "            if decoded > most:\n",
        "            if False:\n",
        "tests/data/test_bounds.py::test_a_dictionary_that_gives_each_row_a_long_image_is_refused",
    ),
    "a file in the place of a link leads anywhere": (
        "runs.folder",
        "return name.name if update_of(name) is not None else None",
        "return name.name",
        "tests/runs/test_without_links.py::test_a_file_leads_to_no_other_place",
    ),
    "a drive without links keeps no checkpoint": (
        "runs.folder",
        "        if error.errno not in _NO_LINKS:\n",
        "        if True:\n",
        "tests/runs/test_without_links.py::test_a_file_leads_to_no_other_place",
    ),
    "a notebook's way to draw ends a command of another environment": (
        "launch",
        "    if module != named and find_spec(",
        "    if False and find_spec(",
        "tests/runs/test_figures.py::test_a_notebooks_way_to_draw_is_kept_where_it_can_be_imported",
    ),
    "a time left of updates where the batch grows": (
        "runs.pace",
        "done = self._clock(), self._length.samples_before(update)",
        "done = self._clock(), update * 10",
        "tests/runs/test_pace.py::test_where_the_batch_grows_samples_are_counted",
    ),
    "the time left counts what came before a resume": (
        "runs.pace",
        "done - self._first[1]",
        "done",
        "tests/runs/test_pace.py::test_after_a_resume_only_this_process_s_pace_counts",
    ),
    "a line every five seconds of a run of days": (
        "runs.pace",
        "GROWTH * (now - self._started)",
        "0.0",
        "tests/runs/test_pace.py::test_lines_are_limited_by_time_and_not_by_updates",
    ),
    "a notebook keeps each state of a bar": (
        "runs.progress",
        " and not keeps_all_output():",
        ":",
        "tests/runs/test_pace.py::test_a_notebook_and_a_continuous_integration_keep_no_bar",
    ),
    "a terminal takes orders from an error": (
        "recipe.ending",
        "text = printable(without_tokens(str(error)))",
        "text = str(error)",
        "tests/test_text.py::"
        "test_the_last_line_of_a_command_gives_a_terminal_no_orders[InputError]",
    ),
    "a config is written through a link": (
        "runs.outputs",
        "    if path.is_symlink():",
        "    if False:",
        "tests/runs/test_outputs.py::"
        "test_a_config_is_written_through_no_link[True-link_to_nowhere]",
    ),
    "weights are their owner's alone": (
        "runs.folder",
        "        _open_to_others(beside)\n",
        "        pass\n",
        "tests/runs/test_forged.py::"
        "test_weights_and_folders_have_the_mode_of_the_umask[18-493-420]",
    ),
    "an export is known by its names alone": (
        "export.write",
        "    if there and not _is_export(target):",
        "    if False:",
        "tests/export/test_hostile.py::"
        "test_force_replaces_no_folder_that_only_looks_like_an_export[mine]",
    ),
    "a trace takes the stand-in GPU for a device of autograd's": (
        "planning.cost.known_calls",
        '        torch.ones((), device="cpu", requires_grad=True).backward()\n',
        "        pass\n",
        "tests/planning/cost/test_trace.py::"
        "test_a_process_can_fork_after_a_trace_and_a_backward_pass",
    ),
    "an evaluation that ran out of memory begins anew": (
        "recipe.evaluation",
        "        done[0] += len(labels)\n",
        "        pass\n",
        "tests/recipe/test_evaluation.py::test_it_goes_on_at_the_first_sample_that_is_not_counted",
    ),
    "padding of ranks counts as samples": (
        "product.logits",
        "whole[torch.tensor(rows, dtype=torch.long)] = part[: len(rows)]  # the rest is padding",
        "whole[torch.arange(most) % n] = part",
        "tests/product/test_evaluate.py::"
        "test_three_ranks_count_each_sample_once_and_give_one_rank_s_numbers",
    ),
    "ranks make batches of their own, which round otherwise": (
        "product.logits",
        "if row // batch % world_size == rank]",
        "if row % world_size == rank]",
        "tests/product/test_evaluate.py::"
        "test_three_ranks_count_each_sample_once_and_give_one_rank_s_numbers",
    ),
    "a retry after a lack of memory counts a batch twice": (
        "product.logits",
        "        recorder.keep(start)\n",
        "",
        "tests/product/test_evaluate.py::"
        "test_an_evaluation_that_ran_out_of_memory_counts_each_sample_once",
    ),
    "a temperature is measured on the images that it was fitted on": (
        "product.metrics",
        "fit_temperature(logits[~half], labels[~half])",
        "fit_temperature(logits[half], labels[half])",
        "tests/product/test_metrics.py::"
        "test_a_half_is_measured_with_the_temperature_of_the_other_half",
    ),
    "runs of two arms are paired by their order": (
        "studies.judging",
        "        seed: one.values[seed] - other.values[seed]\n"
        "        for seed in sorted(one.values)\n"
        "        if seed in other.values\n",
        "        seed: a - b\n"
        "        for seed, a, b in zip(one.values, one.values.values(), other.values.values())\n",
        "tests/studies/test_judging.py::test_runs_are_paired_by_their_seed_and_not_by_their_order",
    ),
    "no loss is said where the mean lies inside the margin": (
        "studies.judging",
        "if margin is not None and max(-low, high) <= margin + ROUNDING:",
        "if margin is not None and abs(low + high) / 2 <= margin + ROUNDING:",
        "tests/studies/test_judging.py::test_the_verdict_follows_the_interval",
    ),
    "an interval that excludes 0 counts before the margin": (
        "studies.judging",
        "if margin is not None and max(-low, high) <= margin + ROUNDING:",
        "if margin is not None and low <= 0 <= high and max(-low, high) <= margin + ROUNDING:",
        "tests/studies/test_judging.py::test_the_verdict_follows_the_interval",
    ),
    "a diverged seed leaves the verdict as it is": (
        "studies.judging",
        'return "not resolved" if lost or won else verdict',
        "return verdict",
        "tests/studies/test_judging.py::"
        "test_a_place_with_a_diverged_seed_has_no_no_loss_and_no_gain",
    ),
    "the resolution of seeds forgets that two runs differ": (
        "studies.seeds",
        "spread * math.sqrt(2 * (1 - correlation) / num_seeds)",
        "spread * math.sqrt((1 - correlation) / num_seeds)",
        "tests/studies/test_seeds.py::test_the_resolution_is_the_half_width_that_studies_come_to",
    ),
    "the scaling limit is the largest batch that is good again": (
        "studies.limits",
        "        if stopped:\n            break\n",
        "        if stopped:\n            continue\n",
        "tests/studies/test_limits.py::"
        "test_the_scaling_limit_is_the_last_batch_before_the_first_loss",
    ),
    "a diverged run does not end the scaling": (
        "studies.limits",
        "        if places[batch].diverged:\n",
        "        if False:\n",
        "tests/studies/test_limits.py::test_a_diverged_run_ends_the_scaling",
    ),
    "a result is the best evaluation": (
        "studies.outcome",
        "return float(median(value for value in values if value is not None))",
        "return float(max(point.value for point in points if point.value is not None))",
        "tests/studies/test_results.py::"
        "test_a_result_is_the_median_of_the_last_evaluations_and_never_the_best",
    ),
    "a diverged run is left out of its place": (
        "studies.results",
        'frozenset(r.cell.seed for r in runs if r.state == "diverged")',
        "frozenset()",
        "tests/studies/test_results.py::test_a_diverged_run_counts_and_is_no_run_that_is_left_out",
    ),
    "a run that goes on counts as one that never met the target": (
        "studies.one_run",
        '"censored": ended and study.target is not None',
        '"censored": study.target is not None',
        "tests/studies/test_results.py::test_a_run_that_is_missing_or_goes_on_has_no_result_yet",
    ),
    "a censored run is left out of the fit": (
        "studies.to_target",
        "profile = _Profile(met, censored)",
        "profile = _Profile(met, [])",
        "tests/studies/test_to_target.py::test_a_censored_run_is_no_run_that_is_left_out",
    ),
    "the mean updates to a target are those of the fast seeds": (
        "studies.to_target",
        "None if censored or not met else fmean(met)",
        "fmean(met) if met else None",
        "tests/studies/test_to_target.py::test_a_mean_is_not_that_of_the_fast_seeds_alone",
    ),
    "the interval of a critical batch takes a large sample's quantile": (
        "studies.to_target",
        "n / 2 * math.log1p(float(fdtri(1, n - 2, LEVEL)) / (n - 2))",
        "3.8415 / 2",
        "tests/studies/test_to_target.py::"
        "test_without_censored_runs_it_is_least_squares_of_the_logarithms_and_its_f_test",
    ),
    "a line to run an experiment again rounds its numbers": (
        "studies.provenance",
        "return short if float(short) == value else repr(value)",
        "return short",
        "tests/studies/test_provenance.py::"
        "test_the_line_read_again_has_the_settings_of_the_experiment",
    ),
    "predictions of other images are compared image by image": (
        "studies.on_images",
        "if first and second and list(first) == list(second):",
        "if first and second and len(first) == len(second):",
        "tests/studies/test_results.py::test_predictions_of_other_images_are_not_compared",
    ),
    "a place is compared with itself under another name": (
        "studies.results",
        "        if share_runs(runs[one], runs[other]):\n",
        "        if False:\n",
        "tests/studies/test_results.py::"
        "test_places_of_equal_settings_share_their_runs_and_are_not_compared",
    ),
    "one damaged run ends the report of a study": (
        "studies.one_run",
        "    except _UNREADABLE as error:\n",
        "    except ZeroDivisionError as error:\n",
        "tests/studies/test_results.py::test_a_damaged_run_is_one_warning_and_the_rest_is_judged",
    ),
    "a file that can't be read shifts the answers": (
        "product.prediction",
        "                    yield Prediction(file, (), (), error=image)\n",
        "                    next(rows, None)\n"
        "                    yield Prediction(file, (), (), error=image)\n",
        "tests/product/test_prediction.py::test_a_broken_file_among_many_shifts_no_answer",
    ),
    "a copy of an image overwrites another": (
        "product.sorting",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL",
        "os.O_WRONLY | os.O_CREAT | os.O_TRUNC",
        "tests/product/test_sorting.py::"
        "test_files_of_one_name_are_both_kept_and_a_second_call_adds_none",
    ),
    "the next evaluation tries again what did not fit": (
        "recipe.evaluation",
        "        room.most = size // 2\n",
        "        batch_size = size // 2\n",
        "tests/recipe/test_evaluation.py::"
        "test_memory_that_runs_out_halves_the_batch_and_no_sample_counts_twice_or_not_at_all",
    ),
    "a resume leaves out the evaluation that failed": (
        "train",
        "        t.log.evaluation_due = True\n",
        "        pass\n",
        "tests/recipe/test_evaluation.py::test_a_corrupt_validation_image_costs_no_update",
    ),
    "Ctrl-C ends the workers of the evaluation": (
        "data.passes",
        "        **worker_options(),\n",
        "",
        "tests/recipe/test_evaluation.py::test_ctrl_c_in_the_evaluation_leaves_its_workers_alive",
    ),
    "the other ranks do not hear that the first could not save": (
        "runs.session",
        "            decided(self.accelerator, lambda: self._writes(write))\n",
        "            self._writes(write) if self.accelerator.is_main_process else None\n",
        "tests/recipe/test_saving.py::"
        "test_a_full_disk_of_the_first_rank_ends_all_ranks_with_one_message",
    ),
    "a lack of memory is the end of a checkpoint": (
        "recipe.saving",
        "        for last in (False, True):\n",
        "        for last in (True,):\n",
        "tests/recipe/test_saving.py::test_memory_that_runs_out_once_costs_no_checkpoint",
    ),
    "a connection that breaks anywhere is a rank's": (
        "recipe.unforeseen",
        "isinstance(error, RuntimeError) and _PEER",
        "isinstance(error, Exception) and _PEER",
        "tests/recipe/test_unforeseen.py::test_a_defect_and_our_own_errors_stay_as_they_are",
    ),
    "a workspace is measured below the samples where its algorithm changes": (
        "planning.cost.kernel_memory",
        "        first = MANY\n",
        "        pass\n",
        "tests/planning/cost/test_kernel_memory.py::"
        "test_the_path_that_ATen_changes_at_16_samples_is_followed",
    ),
    "a plan for a GPU counts what is kept without a limit": (
        "planning.cost.cuda_limit",
        "return limits[first] if first < len(limits) else reserved",
        "return reserved",
        "tests/planning/cost/test_cuda_limit.py::"
        "test_a_kept_segment_that_fits_nothing_is_not_counted",
    ),
    "what the first update reserves is enough for all": (
        "planning.cost.cuda_limit",
        "    for _ in range(1, UPDATES):",
        "    for _ in range(0):",
        "tests/planning/cost/test_cuda_limit.py::"
        "test_what_a_second_update_reserves_more_is_counted",
    ),
    "a limit is enough at which each update empties the cache": (
        "planning.cost.cuda_limit",
        "return not any(retries[-SETTLED:])",
        "return True",
        "tests/planning/cost/test_cuda_limit.py::"
        "test_a_limit_at_which_updates_go_on_emptying_the_cache_is_not_enough",
    ),
    "a plan may be slower than one that was traced": (
        "planning.search",
        "return self._not_slower(found or self._smallest(layout))",
        "return found or self._smallest(layout)",
        "tests/planning/test_planner.py::"
        "test_no_plan_is_slower_by_its_own_model_than_one_that_was_traced_and_fits",
    ),
    "the seconds of a unit may be below zero": (
        "planning.lines",
        "size * min(one / self.sizes[0], two / self.sizes[1]),",
        "-math.inf,",
        "tests/planning/test_planner.py::"
        "test_a_units_seconds_are_never_below_zero_however_small_the_micro_batch",
    ),
    "a workspace holds for any number of threads": (
        "planning.cost.processor",
        "        torch.get_num_threads(),\n",
        "        1,\n",
        "tests/planning/cost/test_kernel_memory.py::"
        "test_each_number_of_threads_has_workspaces_of_its_own",
    ),
    "a kernel that can't be measured takes nothing": (
        "planning.cost.workspace",
        "return otherwise",
        "return 0",
        "tests/planning/cost/test_kernel_memory.py::"
        "test_no_memory_for_a_call_is_no_failure_of_the_plan",
    ),
    "a workspace is measured where seconds alone are read": (
        "planning.cost.workspace",
        "return Later(partial(self._measured, name, _without_memory(args), otherwise))",
        "return self._measured(name, args, otherwise)",
        "tests/planning/cost/test_later.py::test_a_survey_measures_no_kernel_and_an_estimate_does",
    ),
    "a workspace that waits keeps the tensors of its call": (
        "planning.cost.workspace",
        "name, _without_memory(args), otherwise",
        "name, args, otherwise",
        "tests/planning/cost/test_later.py::"
        "test_a_workspace_that_waits_keeps_no_storage_of_the_trace",
    ),
    "a plan has no margin": (
        "planning.cost.workspace",
        "return MARGIN * torch.get_num_threads()",
        "return 0",
        "tests/planning/test_measure.py::"
        "test_the_measured_peak_is_below_the_predicted_one_and_at_most_its_margin_below",
    ),
    "1, 1.0 and true make the same result": (
        "planning.cost.known_calls",
        "key += (kind, value)",
        "key.append(value)",
        "tests/planning/cost/test_known_calls.py::"
        "test_a_known_call_gives_what_torch_gives[by one, whole or not]",
    ),
    "a view lies where the view of an earlier call lay": (
        "planning.cost.known_calls",
        "            key += [t.storage_offset() for t in tensors]\n",
        "            pass\n",
        "tests/planning/cost/test_known_calls.py::"
        "test_a_known_call_gives_what_torch_gives[of an offset]",
    ),
    "the square of a tensor costs what a product of two costs": (
        "planning.cost.known_calls",
        "                if other is value:",
        "                if False:",
        "tests/planning/cost/test_known_calls.py::"
        "test_one_tensor_as_both_operands_costs_its_bytes_once",
    ),
    "a kernel that changes the sizes of its argument is known": (
        "planning.cost.known_calls",
        "        and torch.Tag.inplace_view not in func.tags\n",
        "",
        "tests/planning/cost/test_known_calls.py::test_sizes_that_a_call_changes_are_torchs",
    ),
    "a known call has the default dtype of an earlier one": (
        "planning.cost.known_calls",
        "[function, torch.get_default_dtype()]",
        "[function]",
        "tests/planning/cost/test_known_calls.py::test_the_default_dtype_is_a_part_of_a_call",
    ),
    "a kernel costs what it costs with another workspace": (
        "planning.cost.known_calls",
        "        other = KnownCalls()\n",
        "        return self\n        other = KnownCalls()\n",
        "tests/planning/cost/test_known_calls.py::"
        "test_what_a_kernel_costs_is_asked_of_each_workspace",
    ),
    "a kept kernel is that of any number of threads": (
        "planning.cost.kernel_calls",
        "(str(op), args, state)",
        "(str(op), args)",
        "tests/planning/cost/test_kept_kernels.py::"
        "test_another_state_of_this_process_is_another_call",
    ),
    "kernels of another processor are taken": (
        "planning.cost.kept",
        '(document["form"], document["owner"]) == (FORM, self._owner)',
        'document["form"] == FORM',
        "tests/planning/cost/test_kept_kernels.py::test_kernels_of_another_processor_are_not_taken",
    ),
    "what another process kept meanwhile is lost": (
        "planning.cost.kept",
        "results = self._read() | self._results",
        "results = self._results",
        "tests/planning/cost/test_kept_kernels.py::test_two_processes_keep_what_both_have_measured",
    ),
    "an estimate is kept for any contract": (
        "planning.kept_estimates",
        "return contract, precision, what",
        "return precision, what",
        "tests/planning/test_kept_estimates.py::"
        "test_another_contract_precision_or_candidate_is_another_question",
    ),
    "code of the user's is known": (
        "planning.kept_estimates",
        '    return str(getattr(code, "__module__", "")).partition(".")[0] in PACKAGES',
        "    return True",
        "tests/planning/test_kept_estimates.py::test_what_no_text_says_all_of_is_not_kept",
    ),
    "a workspace that was assumed is kept": (
        "planning.estimate",
        "if self.kept is not None and not self.cpu_workspaces.num_assumed:",
        "if self.kept is not None:",
        "tests/planning/test_kept_estimates.py::test_an_assumed_workspace_is_not_kept",
    ),
    "the same module twice is two modules": (
        "planning.kept_estimates",
        "        if id(module) in places:\n",
        "        if False:\n",
        "tests/planning/test_kept_estimates.py::test_what_changes_an_estimate_changes_its_owner",
    ),
    "random states are not traced": (
        "planning.cost.update",
        "            recorder.watch(state)\n",
        "            pass\n",
        "tests/planning/cost/test_trace.py::"
        "test_the_traced_peak_is_that_of_the_real_allocator[mlp]",
    ),
    "a loaded optimizer state keeps its own strides": (
        "update.sharding.replicated",
        "        keep_layouts(optimizer.optimizer)\n",
        "        pass\n",
        "tests/update/sharding/test_optimizer_layouts.py::"
        "test_a_state_of_another_memory_format_is_added_to_the_same_weights",
    ),
    "a strip is enlarged whole": (
        "data.pipelines",
        "Compose([_not_too_long, transform])",
        "transform",
        "tests/data/test_pipelines.py::test_a_strip_is_cut_to_its_middle_before_it_is_enlarged",
    ),
    "the classifier of a pretrained model is as timm draws it": (
        "recipe.model",
        "            nn.init.zeros_(parameter)\n",
        "            pass\n",
        "tests/test_models.py::test_a_new_classifier_starts_at_chance_and_learns",
    ),
    "the same picture in training and validation is not told": (
        "data.same_files",
        "        if twin is not None:\n",
        "        if False:\n",
        "tests/data/test_same_files.py::"
        "test_copies_and_links_are_found_under_any_name_and_class_once_each",
    ),
    "a lock is not waited for while its process dies": (
        "runs.lock",
        "if waited > (_LAST_WORKERS_SECONDS if before.is_gone() else _DYING_SECONDS):",
        "if not before.is_gone() or waited > _LAST_WORKERS_SECONDS:",
        "tests/runs/test_lock.py::"
        "test_a_killed_process_that_still_gives_its_memory_back_is_waited_for",
    ),
    "a run has no lock": (
        "runs.lock",
        "        _wait_for(lock, before)\n",
        "        pass\n",
        "tests/runs/test_lock.py::test_another_process_is_told_who_writes_and_since_when",
    ),
    "a resume takes no lock": (
        "runs.session",
        "        locks.enter_context(writing(run, say=say, instead=instead))\n",
        "        pass\n",
        "tests/runs/test_lock.py::test_a_second_starter_leaves_a_live_run_alone",
    ),
    "a lock of another machine is taken over": (
        "runs.lock",
        "    if before.was_here():\n",
        "    if True:\n",
        "tests/runs/test_lock.py::test_a_lock_of_another_machine_is_not_taken_over",
    ),
    "auto takes a copy of a run": (
        "runs.own_name",
        "own = [name for name in names if _made_as(output / name, names) == name]",
        "own = names",
        "tests/runs/test_lock.py::test_auto_takes_no_copy_of_a_run",
    ),
    "the ranks of the recipe are not compared": (
        "train",
        "    check_started_alike(accelerator, settings)\n",
        "",
        "tests/runs/test_alike.py::"
        "test_a_rank_with_another_setting_ends_all_and_is_named"
        "[flags0---seed is 4 on ranks 0, 1 and 5 on rank 2]",
    ),
    "the data of the ranks are not compared": (
        "recipe.task",
        "    if accelerator.num_processes > 1:\n        same",
        "    if False:\n        same",
        "tests/runs/test_alike.py::test_a_rank_that_has_one_file_fewer_ends_all_and_is_named",
    ),
    "the hyper-parameters of a loop's ranks are not compared": (
        "update.agreement",
        "**_of_optimizer(optimizer), ",
        "",
        "tests/runs/test_alike.py::test_ranks_of_a_loop_of_ones_own_stop_together"
        "[rate-lr in group 0 of the optimizer is 0.1 on ranks 0, 1 and 0.2 on rank 2]",
    ),
    "a missing line of the metrics is passed over": (
        "runs.metric_lines",
        "            if missing > 0:\n",
        "            if False:\n",
        "tests/runs/test_metric_lines.py::test_compare_and_advise_name_gaps_beside_their_result",
    ),
    "a resume scales the groups again": (
        "optim.groups",
        "stands_at = group.get(SCALED_TO, base_batch_size)",
        "stands_at = base_batch_size",
        "tests/optim/test_groups.py::test_a_resume_scales_nothing_twice_in_either_order",
    ),
    "layer decay and head factor are left to timm's schedulers": (
        "recipe.optimizer",
        "    apply_lr_scale(optimizer)\n",
        "",
        "tests/optim/test_groups.py::"
        "test_three_groups_are_the_classifier_the_last_five_blocks_and_the_rest[convnext_atto]",
    ),
    "the head's rate is logged": (
        "train",
        "lr = reference_lr(t.scheduler.optimizer)",
        "lr = max(t.scheduler.get_last_lr())",
        "tests/optim/test_groups.py::"
        "test_the_recipe_logs_the_rate_without_the_head_s_factor_and_resumes_with_it",
    ),
    "momentum keeps the old learning rate": (
        "optim.momentum",
        "held.mul_(lr / before)",
        "pass",
        "tests/optim/test_momentum.py::"
        "test_the_form_with_the_rate_in_its_momentum_is_wrong_by_itself_and_right_when_corrected",
    ),
    "a resume corrects the momentum from nothing": (
        "optim.momentum",
        "                group[IN] = lr\n",
        "                group[IN] = optimizer.defaults['lr']\n",
        "tests/optim/test_momentum.py::test_a_resume_corrects_once_wherever_it_falls[3]",
    ),
    "the average keeps its decay an update": (
        "hyperparameters.items",
        "old**m.k",
        "old",
        "tests/hyperparameters/test_transfer.py::"
        "test_a_recipe_s_file_is_moved_from_its_own_batch_and_keeps_the_rest",
    ),
    "LARS without weight decay is built as SGD": (
        "optim.optimizers",
        "    _check_trust_ratio(name, weight_decay)\n",
        "",
        "tests/optim/test_trust_ratio.py::"
        "test_so_the_recipe_refuses_them_without_weight_decay[None-lars]",
    ),
    "LAMB clips at 1.0 beside the clipping asked for": (
        "optim.optimizers",
        'options["max_grad_norm"] = None',
        "pass",
        "tests/optim/test_trust_ratio.py::"
        "test_lamb_is_the_paper_s_and_clips_at_one_only_where_nothing_was_asked[7.0-True]",
    ),
    "LEGW's warmup is saved multiplied": (
        "recipe.rate",
        '"warmup_epochs": self.asked_warmup_epochs',
        '"warmup_epochs": self.warmup_epochs',
        "tests/optim/test_groups.py::"
        "test_legw_s_warmup_is_saved_as_asked_so_that_a_run_from_its_settings_is_the_same",
    ),
    "a recompute sees the average that its forward moved": (
        "update.averages",
        "        self._take()\n        self._put_back()\n",
        "        self._take()\n",
        "tests/update/test_averages.py::"
        "test_a_declared_average_of_the_model_moves_as_by_the_whole_batch[buffer-True]",
    ),
    "averages are not summed over the ranks": (
        "update.averages",
        "                dist.all_reduce(average.total)\n",
        "                pass\n",
        "tests/update/test_averages.py::"
        "test_two_ranks_move_a_declared_average_as_one_process[buffer-4]",
    ),
    "a note of one forward is taken for a state": (
        "update.writes",
        "_apart(changed[path], first[path]) > 10 * _apart(second[path], first[path])",
        "True",
        "tests/update/test_writes.py::test_caches_notes_and_counters_are_no_error",
    ),
    "the loss function's tensors go on from the plan before": (
        "verification.updates",
        "        self.reset()\n",
        "",
        "tests/verification/test_states.py::test_a_momentum_encoder_shows_from_the_second_update",
    ),
    "tail divided by the full batch": (
        "update.transaction",
        "                    num_samples=update.num_samples,",
        "                    num_samples=8,",
        "tests/update/test_engine.py::"
        "test_class_weights_and_ignored_targets_equal_the_full_batch[3]",
    ),
    "every micro-batch weighs the same": (
        "update.loss_sums",
        "weight = float(micro_batch.num_samples)",
        "weight = self._num_samples / 6",
        "tests/update/test_engine.py::test_three_epochs_equal_training_on_whole_batches[drop]",
    ),
    "mean of means of weighted losses": (
        "update.loss_sums",
        "weight = weight.detach().double()",
        "weight = torch.tensor(float(micro_batch.num_samples)).double()",
        "tests/update/test_engine.py::"
        "test_class_weights_and_ignored_targets_equal_the_full_batch[3]",
    ),
    "no division by the weights": (
        "update.transaction",
        "divisor = agreement.weight / update.num_samples if agreement.own_weights else 1.0",
        "divisor = 1.0",
        "tests/update/test_engine.py::"
        "test_class_weights_and_ignored_targets_equal_the_full_batch[3]",
    ),
    "gradients averaged over the ranks": (
        "update.accumulation",
        "    dist.all_reduce(flat)\n",
        "    dist.all_reduce(flat)\n    flat /= dist.get_world_size()\n",
        "tests/randomness/test_masks.py::test_ranks_draw_the_masks_of_one_process",
    ),
    "each micro-batch clipped": (
        "update.accumulation",
        "backward(scaled)\n",
        "(backward(scaled), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))\n",
        "tests/update/test_engine.py::test_three_epochs_equal_training_on_whole_batches[keep]",
    ),
    "the last micro-batch's loss is logged": (
        "update.loss_sums",
        "self._loss = self._weightless.added(self._loss, loss, weight)",
        "self._loss = loss.detach().double() * self._num_samples",
        "tests/update/test_engine.py::test_three_epochs_equal_training_on_whole_batches[keep]",
    ),
    "the last short update of a run is forgotten": (
        "batch.stream",
        "return max(1, first + max(0, -(-rest // self.size_in(whole))))",
        "return max(1, first + max(0, rest // self.size_in(whole)))",
        "tests/batch/test_batch.py::test_a_fraction_of_an_epoch_is_rounded_up_to_whole_updates",
    ),
    "trials without a backward pass": (
        "update.accumulation",
        "            backward(scaled)\n",
        "            backward(scaled) if num_samples > 24 else None\n",
        "tests/update/memory/test_oom.py::test_a_trial_runs_the_backward_pass_of_two_micro_batches",
    ),
    "clipping skipped": (
        "update.sharding.replicated",
        "if self._clip_grad_norm is not None and finite:",
        "if False:",
        "tests/update/test_engine.py::test_clipping_comes_after_the_sum[0.01-11]",
    ),
    "loss scale not undone before clipping": (
        "update.sharding.replicated",
        "scaler.unscale_(self._optimizer.optimizer)",
        "pass",
        "tests/update/test_engine.py::"
        "test_the_loss_scale_is_undone_before_the_norm_is_taken_and_clipped",
    ),
    "overflow moves the counters": (
        "update.sharding.replicated",
        '"skipped" if self._optimizer.step_was_skipped else "written"',
        '"written"',
        "tests/update/test_engine.py::"
        "test_an_overflow_in_any_micro_batch_skips_the_update_and_moves_nothing[2]",
    ),
    "scheduler steps twice": (
        "update.engine",
        "after_update(self._scheduler, dropped=dropped)",
        "after_update(self._scheduler, dropped=dropped); self._scheduler.step()",
        "tests/update/test_engine.py::test_scheduler_and_ema_move_once_an_update",
    ),
    "statistics of a failed update stay": (
        "update.normalization",
        "self._pending.zero_()",
        "pass",
        "tests/update/test_engine.py::"
        "test_an_exception_in_any_micro_batch_leaves_no_trace_in_the_next_update[3]",
    ),
    "not finite is not noticed": (
        "update.sharding.replicated",
        "if not finite and (scaler is None or self._all_finite()):",
        "if False:",
        "tests/update/test_engine.py::"
        "test_a_loss_that_is_not_finite_stops_with_update_and_samples_and_writes_nothing[inf]",
    ),
    "weights cast in every micro-batch": (
        "update.transaction",
        "cache = _autocast_cache(device.type) if keeps else nullcontext()",
        "cache = nullcontext()",
        "tests/update/test_engine.py::test_autocast_casts_the_weights_once_an_update[True]",
    ),
    "recompute moves statistics": (
        "update.ghost_layers",
        "discard = norm.recomputing or norm.micro_batch.is_filler",
        "discard = norm.micro_batch.is_filler",
        "tests/update/test_normalization.py::"
        "test_recompute_counts_no_ghost_batch_twice[BatchNorm2d-True-False]",
    ),
    "a filler moves statistics": (
        "update.ghost_layers",
        "discard = norm.recomputing or norm.micro_batch.is_filler",
        "discard = norm.recomputing",
        "tests/update/test_normalization.py::test_a_filler_leaves_no_statistic",
    ),
    "ghost batches of a layout that ATen's kernel does not take are written in place": (
        "update.ghost_kernel",
        "    if not any(x.is_contiguous(memory_format=layout)",
        "    if not any(True",
        "tests/update/test_ghost_kernel.py::"
        "test_another_layout_takes_the_ordinary_route_and_is_right[an expanded one]",
    ),
    "where torch takes cuDNN, ghost batches are written in place": (
        "update.ghost_kernel",
        'device == "cuda" and _is_torchs_own(x, weight, bias, eps)',
        'device == "cuda"',
        "tests/update/test_ghost_kernel.py::"
        "test_where_cudnn_would_be_taken_the_ordinary_route_stays[shape1-dtype1-False]",
    ),
    "torch is not asked which kernel CUDA gets": (
        "update.ghost_kernel",
        "return backend == _C._BatchNormBackend.Native",
        "return True",
        "tests/update/test_ghost_kernel.py::"
        "test_on_cuda_torch_itself_is_asked_which_kernel_it_takes[Cudnn]",
    ),
    "ghost batches written in place have no second gradient": (
        "update.ghost_kernel",
        "joins = torch.is_grad_enabled()",
        "joins = False",
        "tests/update/test_ghost_kernel.py::test_gradients_of_gradients_are_those_of_the_formula",
    ),
    "the place of a batch of gradients is that of one": (
        "update.ghost_kernel",
        "grad.new_empty_strided(x.shape, x.stride())",
        "torch.empty_like(x)",
        "tests/update/test_ghost_kernel.py::test_batched_gradients_are_those_of_each",
    ),
    "the place of a gradient has another layout": (
        "update.ghost_kernel",
        "grad.new_empty_strided(x.shape, x.stride())",
        "grad.new_empty(x.shape)",
        "tests/update/test_ghost_kernel.py::"
        "test_outputs_gradients_and_layouts_are_those_of_split_and_join[shape3-True-True-True]",
    ),
    "vmap and jvp meet ghost batches written in place": (
        "update.ghost_kernel",
        "if _C._are_functorch_transforms_active() or forward_ad._current_level >= 0:",
        "if False:",
        "tests/update/test_ghost_kernel.py::test_transforms_of_functions_take_the_ordinary_route",
    ),
    "a tensor of a subclass loses it in ghost batches": (
        "update.ghost_kernel",
        "if any(type(t) not in _PLAIN for t in tensors) or has_torch_function(tensors):",
        "if False:",
        "tests/update/test_ghost_kernel.py::test_a_subclass_of_tensors_takes_the_ordinary_route",
    ),
    "weights in half precision are given statistics of another dtype": (
        "update.ghost_kernel",
        "if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:",
        "if len(kinds) != 1:",
        "tests/update/test_ghost_kernel.py::test_weights_in_half_precision_take_the_ordinary_route",
    ),
    "the gradients of all ghost batches are held until the last": (
        "update.ghost_kernel",
        "found[-1][0] = None",
        "pass",
        "tests/update/test_ghost_kernel.py::"
        "test_a_forward_holds_one_output_and_a_backward_one_run_more[True]",
    ),
    "moments of an update count samples where they are of values": (
        "update.ghost_layers",
        "_merge(slot, mean, var, size * x.shape[2:].numel())",
        "_merge(slot, mean, var, size)",
        "tests/update/test_normalization.py::"
        "test_per_update_statistics_are_those_of_the_whole_batch",
    ),
    "a trace for CUDA runs the kernels of the CPU": (
        "planning.cost.update",
        "norm.device_type = device_type",
        "pass",
        "tests/planning/cost/test_trace.py::"
        "test_a_trace_for_cuda_joins_ghost_batches_where_cudnn_takes_them[fp32-True]",
    ),
    "a place that is only made costs a pass over it": (
        "planning.cost.trace",
        '"new_empty", "new_empty_strided"',
        '"new_empty"',
        "tests/planning/cost/test_trace.py::"
        "test_of_several_ghost_batches_too_and_no_kernel_joins_them[resnet18]",
    ),
    "the pages of a given place are free": (
        "planning.cost.time_model",
        'return 0.0 if kernel.name == "aten.empty" else _page_faults(kernel, device)',
        "return 0.0",
        "tests/planning/cost/test_time_model.py::"
        "test_page_faults_count_once_whether_the_kernel_makes_its_result_or_is_given_a_place",
    ),
    "a known call leaves out that it changed a size": (
        "planning.cost.known_calls",
        "if now is not None and now.key == call.key:",
        "if True:",
        "tests/planning/cost/test_known_calls.py::test_sizes_that_a_call_changes_are_torchs",
    ),
    "BatchNorm over the micro-batch": (
        "update.ghost_layers",
        "        sizes,\n        moments,\n",
        "        (sum(sizes),),\n        moments[:1],\n",
        "tests/update/test_normalization.py::"
        "test_statistics_move_once_a_ghost_batch_and_only_at_commit[BatchNorm1d-shape0-0.7]",
    ),
    "merged variance without the spread of the means": (
        "update.ghost_layers",
        "m2 += m2_b + delta.square_().mul_(n * (n_b / (n + n_b)))",
        "m2 += m2_b",
        "tests/update/test_normalization.py::"
        "test_per_update_statistics_are_those_of_the_whole_batch",
    ),
    "merged variance without Bessel's correction": (
        "update.normalization",
        "(layer.running_var, m2 / (n - 1))",
        "(layer.running_var, m2 / n)",
        "tests/update/test_normalization.py::"
        "test_per_update_statistics_are_those_of_the_whole_batch",
    ),
    "all layers of BatchNorm have the momentum of one": (
        "update.normalization",
        "place = slice(None) if len(here) == len(layers) else here",
        "place = slice(None)",
        "tests/update/test_normalization.py::test_each_of_several_momenta_moves_its_own_layers",
    ),
    "statistics of ranks in any order": (
        "update.normalization",
        "(1 - momentum) ** after[:, place]",
        "(1 - momentum) ** (0 * after[:, place])",
        "tests/update/test_normalization.py::"
        "test_commit_over_ranks_equals_one_process_in_order_of_position",
    ),
    "BatchNormAct2d left out": (
        "update.ghost_layers",
        "for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)",
        "for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)",
        "tests/update/test_normalization.py::"
        "test_statistics_move_once_a_ghost_batch_and_only_at_commit[BatchNormAct2d-shape4-0.7]",
    ),
    "recompute with other masks": (
        "randomness.masks",
        "if token not in self._calls:\n            if self._recomputing:",
        "if self._recomputing:\n            self._calls[token] = len(self._calls)\n"
        "        if token not in self._calls:\n            if False:",
        "tests/randomness/test_masks.py::"
        "test_a_network_with_masks_gives_one_update_under_every_plan[swin, windows]",
    ),
    "masks of the micro-batch, not of the sample": (
        "randomness.masks",
        "arange(micro_batch.start, micro_batch.start + count, device=device)",
        "arange(count, device=device)",
        "tests/randomness/test_masks.py::test_keys_hashed_ahead_are_those_of_the_samples",
    ),
    "masks by the rows of a tensor, samples or not": (
        "update.mask_layouts",
        "randomness.must_learn = not always",
        "self._given_up = True",
        "tests/randomness/test_layouts.py::"
        "test_a_mask_is_the_same_wherever_the_samples_stand[of_a_table]",
    ),
    "the rows of a sample are neighbours, whatever they are": (
        "randomness.layouts",
        "runs = _runs(more.sums[dim], turned.sums[dim] if dim < len(turned.sums) else None, k)",
        "runs = 1",
        "tests/randomness/test_layouts.py::"
        "test_a_mask_is_the_same_wherever_the_samples_stand[tokens_first_in_rows]",
    ),
    "the compiler may drop, merge and move calls for masks": (
        "randomness.in_graph",
        '"drawn(Tensor(a!) order,',
        '"drawn(Tensor order,',
        "tests/randomness/test_in_graph.py::"
        "test_a_compiled_update_has_the_masks_of_the_plain_one[Unread-whole-once]",
    ),
    "a call in a graph is named as it is traced": (
        "randomness.in_graph",
        "GraphCall(run, place)",
        "GraphCall(0, place)",
        "tests/randomness/test_in_graph.py::"
        "test_a_compiled_update_has_the_masks_of_the_plain_one[Blocks-by_blocks-once]",
    ),
    "each graph is compiled anew, as its calls count on": (
        "randomness.masks",
        "        begin_places()\n",
        "",
        "tests/randomness/test_in_graph.py::"
        "test_equal_networks_have_equal_graphs_so_that_a_cache_has_them",
    ),
    "a method is replaced, which no graph looks at": (
        "randomness.draws",
        '(drop, "drop_path", _drop_path),',
        '(drop.DropPath, "forward", lambda source, plain: lambda layer, x: _drop_path('
        "source, lambda *_: plain(layer, x))"
        "(x, layer.drop_prob, layer.training, layer.scale_by_keep)),",
        "tests/randomness/test_in_graph.py::"
        "test_a_compiled_layer_gives_the_bits_of_the_plain_one[DropPath-torch.float32]",
    ),
    "all calls of a graph have one name": (
        "randomness.in_graph",
        "    return next(_places[0])",
        "    return 0",
        "tests/randomness/test_in_graph.py::"
        "test_a_compiled_update_has_the_masks_of_the_plain_one[Blocks-whole-once]",
    ),
    "a graph writes what the one before keeps for its backward pass": (
        "randomness.in_graph",
        "    if run == source.run:",
        "    if False:",
        "tests/randomness/test_in_graph.py::"
        "test_a_compiled_update_has_the_masks_of_the_plain_one[Recomputed-whole-twice]",
    ),
    "a call that the compiler runs again counts as a new one": (
        "randomness.masks",
        "if of not in self._in_graphs:",
        "if True:",
        "tests/randomness/test_in_graph.py::"
        "test_the_compiler_may_make_masks_again_in_the_backward_pass[0.0]",
    ),
    "the compiler writes into a mask that is kept": (
        "randomness.masks",
        "return found.mask.clone()",
        "return found.mask",
        "tests/randomness/test_in_graph.py::"
        "test_a_mask_that_the_compiler_writes_into_is_not_the_one_kept_for_the_next_samples",
    ),
    "the compiler writes into bits that are kept": (
        "randomness.masks",
        "bits.clone(memory_format=torch.contiguous_format)",
        "bits.contiguous()",
        "tests/randomness/test_in_graph.py::"
        "test_a_mask_that_the_compiler_writes_into_is_not_the_one_kept_for_the_next_samples",
    ),
    "a mask in a graph has the strides of its samples": (
        "randomness.masks",
        "return keep_mask(bits, keep).contiguous()",
        "return keep_mask(bits, keep)",
        "tests/randomness/test_in_graph.py::"
        "test_the_operator_keeps_what_it_declares[3-each1-0.5-1]",
    ),
    "a graph holds calls that have no keys": (
        "randomness.masks",
        "self.must_learn if learned is None else learned.all_known",
        "self.must_learn or learned is not None",
        "tests/randomness/test_in_graph.py::"
        "test_a_tensor_without_a_place_for_its_samples_breaks_the_graph_and_is_drawn_as_before",
    ),
    "a graph of a micro-batch is used outside of one": (
        "randomness.masks",
        "self._micro_batch, self._recomputing, self.in_graph = None, False, False",
        "self._micro_batch, self._recomputing = None, False",
        "tests/randomness/test_in_graph.py::"
        "test_outside_of_a_micro_batch_calls_have_no_keys_and_break_the_graph",
    ),
    "each mask breaks the graph": (
        "randomness.in_graph",
        "return source.in_graph and torch.compiler.is_dynamo_compiling()",
        "return False",
        "tests/randomness/test_in_graph.py::"
        "test_a_compiled_update_has_the_masks_of_the_plain_one[Blocks-whole-once]",
    ),
    "the same masks in every layer": (
        "randomness.masks",
        "self._calls[token] = len(self._calls)\n",
        "self._calls[token] = 0\n",
        "tests/randomness/test_masks.py::"
        "test_the_draw_of_a_sample_is_the_same_in_every_partition[Dropout of maps]",
    ),
    "the same masks in every update": (
        "randomness.masks",
        "return int(keyed_hash(self.seed, MASKS, self._update))",
        "return int(keyed_hash(self.seed, MASKS, 0))",
        "tests/randomness/test_masks.py::"
        "test_the_draw_of_a_sample_is_the_same_in_every_partition[Dropout of maps]",
    ),
    "keys hashed ahead are used for samples past them": (
        "randomness.ahead",
        "skipped + count > self.count",
        "skipped > self.count",
        "tests/randomness/test_masks.py::test_keys_hashed_ahead_are_those_of_the_samples",
    ),
    "a mask made ahead is used for samples past it": (
        "randomness.ahead",
        "start < made.start or stop > made.stop",
        "start < made.start or start >= made.stop",
        "tests/randomness/test_ahead.py::"
        "test_a_mask_is_that_of_the_hash_to_the_bit[made ahead for some samples-torch.float32]",
    ),
    "a mask made ahead is used for another rate": (
        "randomness.ahead",
        "place = start + self.samples, (row, of_sample, keep, scale)",
        "place = start + self.samples, (row, of_sample)",
        "tests/randomness/test_ahead.py::"
        "test_calls_of_several_rates_and_shapes_take_no_mask_of_each_other",
    ),
    "masks made ahead are kept after their update": (
        "randomness.masks",
        "            self._ahead = {}\n            self._elements.forget()\n",
        "",
        "tests/randomness/test_ahead.py::test_what_was_made_ahead_ends_with_its_update",
    ),
    "the numbers of elements are folded in each call": (
        "randomness.draws",
        "    if elements is None:\n        elements = folded",
        "    if True:\n        elements = folded",
        "tests/randomness/test_ahead.py::test_a_call_launches_few_kernels[layer2-shape2-10]",
    ),
    "keys hashed ahead outlive their update": (
        "randomness.masks",
        "place = micro_batch.num_samples, (self._update, block)",
        "place = micro_batch.num_samples, block",
        "tests/randomness/test_masks.py::test_keys_hashed_ahead_are_those_of_the_samples",
    ),
    "an update moves the user's random state": (
        "randomness.masks",
        "            restore_generators(states, self.device)",
        "            pass",
        "tests/randomness/test_masks.py::test_an_update_leaves_every_generator_where_it_was",
    ),
    "any RuntimeError counts as a lack of memory": (
        "update.memory.oom",
        "if _CERTAIN.search(text):",
        "if True:",
        "tests/update/memory/test_oom.py::test_nothing_else_counts",
    ),
    "std::bad_alloc is missed": (
        "update.memory.oom",
        'r"^std::bad_alloc\\b",',
        "",
        "tests/update/memory/test_oom.py::test_each_librarys_way_to_say_it_counts[std::bad_alloc1]",
    ),
    "only the rank that ran out shrinks": (
        "update.accumulation",
        "if num_ran_out:",
        "if ran_out:",
        "tests/update/memory/test_oom.py::"
        "test_ranks_shrink_together_wherever_one_of_them_runs_out[0-forward]",
    ),
    "statistics of the failed attempt are kept": (
        "update.transaction",
        "        self.drop()\n        self.masks.begin()",
        "        self.masks.begin()",
        "tests/update/memory/test_oom.py::"
        "test_an_update_that_ran_out_of_memory_is_that_of_a_run_with_smaller_micro_batches[1-forward]",
    ),
    "random state of the failed attempt goes on": (
        "randomness.masks",
        "seed_generators(int(hashed_on(self._hashed[1], micro_batch.start)), self.device)",
        "pass",
        "tests/randomness/test_masks.py::"
        "test_what_cannot_be_keyed_depends_on_no_micro_batch_that_ran_before",
    ),
    "the failed attempt's frames live on": (
        "update.memory.oom",
        "traceback.clear_frames(error.__traceback__)\n        error.__traceback__ = None",
        "pass",
        "tests/update/memory/test_oom.py::"
        "test_the_failed_attempt_holds_no_activation_when_its_memory_is_given_back",
    ),
    "a failed backward pass keeps what it had still to do": (
        "update.memory.oom",
        "    _forget_backward()\n    gc.collect()",
        "    gc.collect()",
        "tests/update/memory/test_host_limit.py::"
        "test_a_backward_pass_that_failed_keeps_no_activation_of_what_it_had_still_to_do",
    ),
    "a CPU's budget counts addresses that hold nothing": (
        "update.memory.host_limit",
        "left = self.num_bytes - (in_use - self._start)",
        "left = self.num_bytes - (address_space - self._start)",
        "tests/update/memory/test_host_limit.py::"
        "test_pages_in_use_count_and_reserved_addresses_do_not",
    ),
    "a CPU's budget is left to the system's limit, which oneDNN does not survive": (
        "update.memory.host_limit",
        "        self.limit.check()",
        "        pass",
        "tests/update/memory/test_host_limit.py::"
        "test_a_network_whose_kernels_are_compiled_as_it_goes_recovers_to_the_bit",
    ),
    "a shape that was never run is not watched": (
        "update.memory.host_limit",
        "limit.went_well[shapes] >= ENOUGH",
        "limit.went_well.total() >= ENOUGH",
        "tests/update/memory/test_host_limit.py::"
        "test_a_shape_is_checked_until_it_went_well_and_a_new_one_again",
    ),
    "the global batch shrinks with the micro-batch": (
        "update.memory.adaptive",
        "self.plan = replace(self.plan, micro_batch_size=size)",
        "self.plan = replace(self.plan, micro_batch_size=size, global_batch_size=size)",
        "tests/update/memory/test_oom.py::"
        "test_the_micro_batch_grows_again_and_trying_costs_less_and_less",
    ),
    "the retry goes on in the workers' old batches": (
        "data.loader",
        "self._drawn = HALF_READ",
        "self._drawn = index",
        "tests/data/test_loader.py::"
        "test_an_update_that_was_read_in_part_is_read_anew_from_its_start",
    ),
    "a plan for DDP counts one bucket where a parameter is larger": (
        "planning.estimate",
        "buckets = self.gradient_bytes + self._reduction_bytes",
        "buckets = self.gradient_bytes + min(25 * 2**20, self.gradient_bytes)",
        "tests/planning/cost/test_reduction_memory.py",
    ),
    "cuDNN's lack of an engine is no lack of memory": (
        "update.memory.oom",
        r"""            r"\b[Uu]nable to find an engine to execute this computation\b",""",
        "",
        "tests/update/memory/test_oom.py::"
        "test_a_text_with_several_reasons_counts_where_memory_is_short",
    ),
    "a restored model's updates go on without ghost batches": (
        "update.normalization",
        "        if self.restored:\n",
        "        if False:\n",
        "tests/update/test_normalization.py::"
        "test_a_model_that_was_restored_evaluates_as_before_and_its_updates_are_refused",
    ),
    "a copied SyncBatchNorm layer talks to the other ranks": (
        "update.ghost_layers",
        '        "__deepcopy__": _ghost_deepcopy,\n',
        "",
        "tests/update/test_normalization.py::"
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
        "tests/update/memory/test_oom.py::"
        "test_the_loader_loads_ahead_in_the_size_that_memory_allows",
    ),
    "a search that leaves gradients behind": (
        "update.engine",
        "            finally:\n                transaction.drop()",
        "            finally:\n                pass",
        "tests/update/memory/test_oom.py::"
        "test_the_search_finds_the_largest_size_and_leaves_everything_as_it_was",
    ),
    "a search that takes the update away": (
        "data.loader",
        "return self._update(self.next_update)",
        "self.next_update += 1; return self._update(self.next_update - 1)",
        "tests/update/memory/test_oom.py::"
        "test_the_search_finds_the_largest_size_and_leaves_everything_as_it_was",
    ),
    "a step that failed half way is forgotten": (
        "update.sharding.replicated",
        "self.half_stepped = True",
        "pass",
        "tests/update/memory/test_oom.py::"
        "test_memory_that_runs_out_in_the_optimizers_step_is_never_retried",
    ),
    "no room is kept for the optimizer's state": (
        "update.sharding.replicated",
        "self._reservation = Reservation(self._optimizer.optimizer)",
        "self._reservation = Reservation(__import__('torch').optim.SGD(self.parameters, lr=1.0))",
        "tests/update/memory/test_oom.py::test_room_for_the_state_is_held_until_the_step",
    ),
    "a key that wandb login wrote is not seen": (
        "runs.wandb_login",
        """{*_FORGE, "api.wandb.ai"}""",
        """{"api.wandb.ai"}""",
        "tests/runs/test_tracking.py::test_a_key_that_wandb_login_wrote_for_its_own_server_counts",
    ),
    "wandb shows a failed run as finished": (
        "runs.wandb_tracker",
        "self.run.finish(exit_code=self._exit_code)",
        "self.run.finish()",
        "tests/runs/test_wandb_summary.py::"
        "test_a_run_that_fails_says_why_and_is_failed_in_wandb_too",
    ),
    "wandb's second part forgets the best of the first": (
        "train",
        """begun = {"status": "running", "exit_reason": "", **t.log.best_so_far()}""",
        """begun = {"status": "running", "exit_reason": ""}""",
        "tests/runs/test_wandb_summary.py::"
        "test_before_its_end_a_run_is_running_and_has_the_best_so_far",
    ),
    "wandb writes where its process was started": (
        "runs.wandb_tracker",
        '"dir": str(run.absolute()),',
        '"dir": str(run),',
        "tests/runs/test_runs.py::"
        "test_wandb_writes_into_the_run_folder_after_the_working_folder_changed",
    ),
    "the files of an artifact are those that a resume deletes": (
        "runs.wandb_artifact",
        "if tracker.run.offline:",
        "if False:",
        "tests/runs/test_wandb_artifact.py::"
        "test_a_checkpoint_that_a_resume_deletes_stays_in_the_log_of_its_start",
    ),
    "an artifact holds the optimizer's state": (
        "runs.wandb_artifact",
        "    files = [file for file in files if file.is_file()]\n",
        "    files = [file for file in checkpoint.iterdir() if file.is_file()]\n",
        "tests/runs/test_wandb_artifact.py::"
        "test_it_holds_what_the_model_needs_and_no_optimizer_state[best-6-80.0]",
    ),
    "a mean counts runs that did not end": (
        "runs.groups",
        "if best is not None and best.value is not None and ended(one):",
        "if best is not None and best.value is not None:",
        "tests/runs/test_groups_of_runs.py::test_a_run_that_did_not_end_is_in_no_mean_and_is_named[failed]",
    ),
    "runs of one seed are independent draws": (
        "runs.groups",
        "found.setdefault(one.config.get(SEED), [])",
        "found.setdefault(one.name, [])",
        "tests/runs/test_groups_of_runs.py::test_the_best_of_each_seed_counts_once",
    ),
    "an interval is a standard error": (
        "runs.groups",
        "return float(stdtrit(self.n - 1, (1 + LEVEL) / 2)) * math.sqrt",
        "return math.sqrt",
        "tests/runs/test_groups_of_runs.py::test_the_interval_is_students[values0]",
    ),
    "JSON in a page ends its script": (
        "report.page",
        'return markupsafe.Markup(re.sub(r"[^\\n !#-;=?-~\\"]|[&]", _escape, text))',
        "return markupsafe.Markup(text)",
        "tests/report/test_page.py::test_a_hostile_setting_is_text_and_nothing_else",
    ),
    "names in a page are HTML": (
        "report.page",
        "autoescape=True,",
        "autoescape=False,",
        "tests/report/test_page.py::test_a_hostile_name_of_a_run_is_text",
    ),
    "names in a page turn the direction of writing": (
        "report.page",
        "        return printable(value)",
        "        return value",
        "tests/report/test_page.py::test_a_hostile_name_of_a_run_is_text",
    ),
    "a page has its points whatever its size": (
        "report.parts",
        "        if size < MOST_BYTES:",
        "        if size:",
        "tests/report/test_page.py::test_a_page_that_would_be_too_large_has_fewer_points",
    ),
    "a thinned curve loses its peaks": (
        "runs.thin",
        "found |= {min(known)[1], max(known)[1]}",
        "found |= {known[0][1]}",
        "tests/runs/test_thin.py::test_the_extremes_and_the_ends_are_kept",
    ),
    "the seeds of a place are thinned at updates of their own": (
        "studies.curves",
        "zip(curves.items(), kept_together(each, most), strict=True)",
        "zip(curves.items(), (kept_together([c], most)[0] for c in each), strict=True)",
        "tests/report/test_study_page.py::"
        "test_thinned_curves_of_a_study_are_said_to_be_and_their_mean_is_whole",
    ),
    "a study's page does not say that its curves are thinned": (
        "report.study_charts",
        'for name in run.get("thinned") or ()',
        "for name in ()",
        "tests/report/test_study_page.py::"
        "test_thinned_curves_of_a_study_are_said_to_be_and_their_mean_is_whole",
    ),
    "a verdict counts runs that did not end": (
        "report.verdict",
        "return final_value(one.history.get(metric, ()), last) if ended(one) else None",
        "return final_value(one.history.get(metric, ()), last)",
        "tests/report/test_verdict.py::test_a_run_that_did_not_end_has_no_value[failed]",
    ),
    "a seed that diverged is missing": (
        "report.verdict",
        "            diverged.add(seed)",
        "            pass",
        "tests/report/test_verdict.py::test_a_seed_that_diverged_counts_as_such",
    ),
    "a page has the passwords of commands": (
        "report.provenance",
        'return {**found, "reproduce": without_tokens(found["reproduce"])}',
        "return found",
        "tests/report/test_one_run.py::"
        "test_a_run_of_a_loop_of_its_own_is_reproduced_by_its_command",
    ),
    "figures of a study come from anywhere": (
        "report.of_study",
        "if inside else",
        "if True else",
        "tests/report/test_study_page.py::test_figures_are_embedded_from_inside_the_study_alone",
    ),
    "a study whose runs never met the target does not say so": (
        "report.of_study",
        '[one["sentence"] for one in result.get("to_target") or []]',
        '[one["sentence"] for one in result.get("to_target") or [] if updates]',
        "tests/report/test_study_page.py::test_where_no_run_met_the_target_the_page_says_so",
    ),
    "classes are left out of a page without a word": (
        "report.judged",
        '"num_classes": len(figures["classes"]),',
        '"num_classes": len(figures["classes"][:MOST_ROWS]),',
        "tests/report/test_one_run.py::test_classes_that_are_left_out_are_counted",
    ),
    "an event is the reason why a run ended": (
        "report.of_study",
        '"reason": run.get("exit_reason"),',
        '"reason": "; ".join(event["text"] for event in run.get("events") or ()),',
        "tests/report/test_study_page.py::test_an_event_is_no_reason_of_the_end",
    ),
    "a run that stands for two cells counts twice": (
        "studies.verdict",
        '[run for run in runs if run["shared_with"] is None]',
        "list(runs)",
        "tests/report/test_study_page.py::"
        "test_a_run_that_stopped_is_in_a_line_and_a_shared_one_counts_once",
    ),
    "a batch size with a censored seed looks like any other": (
        "report.target_chart",
        'points = [p for p in arm["points"] if p["mean_met"] is not None]',
        'points = [p for p in arm["points"] if p["mean"] is not None]',
        "tests/report/test_study_page.py::"
        "test_a_batch_size_of_which_a_seed_is_censored_is_a_hollow_mark",
    ),
    "where the output goes is a setting of the experiment": (
        "recipe.experiment",
        "return row.contract or row.length or (plan and row.plan)",
        "return True",
        "tests/recipe/test_experiment.py::"
        "test_each_option_is_in_the_contract_or_a_length_or_left_out_for_a_reason",
    ),
    "a null of wandb's server is a value that is not finite": (
        "runs.read_cloud",
        "for key, value in raw.items() if value is not None}",
        "for key, value in raw.items()}",
        "tests/runs/test_read_cloud.py::test_null_is_an_absent_value_and_nan_is_a_gap",
    ),
    "a run that died is running for ever": (
        "runs.read_cloud",
        "        status = one.state",
        "        pass",
        "tests/runs/test_read_cloud.py::"
        "test_a_run_that_died_has_the_status_that_the_server_knows[crashed-summary1-crashed]",
    ),
    "lines of lost updates stay": (
        "runs.tracking",
        """if line.row is not None and line.row["update"] <= update]""",
        "if line.row is not None]",
        "tests/runs/test_resume.py::"
        "test_a_run_may_be_resumed_many_times_and_from_an_older_checkpoint",
    ),
    "a resume deletes the checkpoints behind its update": (
        "runs.abandoned",
        "            path.rename(aside / name)\n",
        "            shutil.rmtree(path)\n",
        "tests/runs/test_abandoned.py::test_a_refused_newest_checkpoint_keeps_its_good_weights",
    ),
    "lines of lost updates are deleted": (
        "runs.abandoned",
        "    _copy_lines(run, update, say=say)\n",
        "",
        "tests/runs/test_abandoned.py::"
        "test_a_resume_from_the_newest_makes_no_folder_and_keeps_the_lines_of_lost_updates",
    ),
    "a loader worker dies of a SIGTERM to the process group": (
        "data.workers",
        "        if sender == parent.pid or not parent.is_alive():\n",
        "        if True:\n",
        "tests/data/test_workers.py::test_a_worker_outlives_the_signals_of_others",
    ),
    "a loader worker that is stuck can't be ended": (
        "data.workers",
        "        if sender == parent.pid or not parent.is_alive():\n",
        "        if not parent.is_alive():\n",
        "tests/data/test_workers.py::test_the_parent_ends_a_stuck_worker_with_one_sigterm",
    ),
    "a second SIGTERM ends a run at once": (
        "recipe.signals",
        "        if number == signal.SIGINT:\n",
        "        if True:\n",
        "tests/recipe/test_signals.py::test_sigterm_and_sighup_never_end_at_once",
    ),
    "nohup is undone": (
        "recipe.signals",
        "not in (signal.SIG_IGN, None)",
        "is not None",
        "tests/recipe/test_signals.py::"
        "test_a_signal_that_the_process_was_started_to_ignore_stays_ignored",
    ),
    "a broken standard output is tried again and again": (
        "recipe.output",
        "        os.dup2(devnull, self.fileno())\n",
        "        pass\n",
        "tests/recipe/test_output.py::test_a_broken_stream_is_said_once_and_written_on",
    ),
    "the lock of a live build is stale": (
        "doctor.build_locks",
        "str(path.resolve()) not in held and path.exists()",
        "path.exists()",
        "tests/doctor/test_build_locks.py::"
        "test_the_lock_of_a_killed_build_is_stale_and_that_of_a_live_one_is_not",
    ),
    "an edited config.yaml is trusted": (
        "recipe.resume",
        "    if contract is not None:\n        content = against(",
        "    if False:\n        content = against(",
        "tests/recipe/test_contract.py::"
        "test_an_edit_of_the_contract_is_refused_by_its_name[weight_decay]",
    ),
    "a lost line is the default's": (
        "recipe.contract",
        "            merged[name] = raw\n",
        "            pass\n",
        "tests/recipe/test_contract.py::test_a_lost_line_is_the_contract_s[seed]",
    ),
    "a checkpoint whose contract nobody compared is taken": (
        "recipe.contract",
        "    if read_contract(checkpoint) != contract:",
        "    if False:",
        "tests/recipe/test_contract.py::"
        "test_a_newest_checkpoint_that_is_refused_leaves_no_contract_that_nobody_compared",
    ),
    "a damaged contract is trusted": (
        "recipe.contract",
        'if hashlib.sha256(content).hexdigest() != expected["sha256"]:',
        "if False:",
        "tests/recipe/test_contract.py::test_a_damaged_contract_counts_for_nothing",
    ),
    "the digest of bytes is not compared": (
        "data.identity",
        'of_bytes="bytes" in before',
        "of_bytes=False",
        "tests/data/test_identity.py::test_a_digest_of_bytes_that_holds_is_no_change",
    ),
    "checksums are not compared": (
        "runs.checkpoints",
        'if found["sha256"] != expected["sha256"]:',
        "if False:",
        "tests/runs/test_resume.py::"
        "test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken[model.safetensors-bit-flipped]",
    ),
    "a checkpoint is renamed before it is on the disk": (
        "runs.folder",
        "        _flush(beside)\n",
        "",
        "tests/runs/test_checkpoints.py::test_files_reach_the_disk_before_the_rename",
    ),
    "a resume passes over a checkpoint that can't be read, and removes it": (
        "runs.checkpoints",
        "        except CannotRead:\n            raise\n",
        "",
        "tests/runs/test_checkpoints.py::"
        "test_a_checkpoint_that_can_not_be_read_stops_a_resume_and_is_not_passed_over",
    ),
    "a new run begins beside one whose settings can't be read": (
        "recipe.resume",
        "        except CannotRead:  # it may be the run that is looked for\n            raise\n",
        "",
        "tests/runs/test_unreadable.py::"
        "test_a_run_whose_settings_can_not_be_read_is_not_passed_over",
    ),
    "a file that torch leaves behind counts as a lock": (
        "doctor.build_locks",
        "if not found or not _is_waited_for():",
        "if not found:",
        "tests/doctor/test_build_locks.py::"
        "test_a_file_that_later_versions_of_torch_leave_blocks_nothing",
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
        "tests/runs/test_checkpoints.py::test_the_way_out_fits_the_disk_s_reason",
    ),
    "a class folder that can't be read is taken for an empty one": (
        "data.folders",
        "os.walk(folder, onerror=refuse, followlinks=True)",
        "os.walk(folder, followlinks=True)",
        "tests/data/test_sources.py::"
        "test_a_folder_that_can_not_be_read_is_named_and_not_taken_for_an_empty_one",
    ),
    "a usage dump is printed in place of a sentence": (
        "recipe.command_line",
        "        raise InputError(self._sentence(message))\n",
        "        super().error(message)\n",
        "tests/recipe/test_command_line.py::test_an_error_is_one_sentence",
    ),
    "a number of infinite size is within every bound": (
        "recipe.bounds",
        "math.isfinite(value) and self.holds(value)",
        "self.holds(value)",
        "tests/commands/test_flags.py::test_a_number_that_is_nothing_at_all_is_always_refused",
    ),
    "a flag reads a number without bounds": (
        "commands.compare",
        "type=bounds.finite",
        "type=float",
        "tests/commands/test_flags.py::test_no_flag_reads_a_number_without_bounds",
    ),
    "transfer moves the values of an optimizer that there is not": (
        "commands.transfer",
        '        check_known(given["optimizer"])\n',
        "        pass\n",
        "tests/commands/test_flags.py::test_a_command_says_in_one_line_why_it_does_not_start",
    ),
    "-inf is taken for a flag": (
        "recipe.command_line",
        "        self._negative_number_matcher = _NEGATIVE\n",
        "",
        "tests/recipe/test_command_line.py::test_an_error_is_one_sentence",
    ),
    "a plot that can't be written is refused after the work": (
        "commands.lr_find",
        "    check_plot(own.plot)\n",
        "",
        "tests/commands/test_unwritable.py",
    ),
    "the mean to be logged is forgotten": (
        "runs.log",
        'self.window = [_counted(*entry) for entry in state["window"]]',
        "self.window = []",
        "tests/runs/test_resume.py::"
        "test_a_resumed_run_is_the_unbroken_one_to_the_bit[1-SGD, EMA, sparse lines]",
    ),
    "a filler counts in the sums over samples": (
        "update.loss_parts",
        "            if counts:\n",
        "            if True:\n",
        "tests/update/test_loss_parts.py::test_ranks_add_them_up_and_a_filler_counts_nothing",
    ),
    "a rank trusts that the others return sums of its names": (
        "update.loss_parts",
        "if world_size * squares != marks**2:",
        "if world_size * self._mark() != marks:",
        "tests/update/test_loss_parts.py::test_names_that_differ_are_noticed_on_each_rank",
    ),
    "a sum over samples keeps its graph": (
        "update.loss_parts",
        "return value.detach().reshape(())",
        "return value.reshape(())",
        "tests/update/test_loss_parts.py::test_a_graph_is_not_kept_alive_by_a_sum",
    ),
    "updates that were not counted have no sample right": (
        "runs.log",
        "if len(hits) == len(self.window)",
        "if hits",
        "tests/recipe/test_counted.py::test_a_window_that_an_earlier_version_began_has_no_top1",
    ),
    "the counted samples of a window are lost by a resume": (
        "runs.log",
        "None if right is None else float(right)",
        "None",
        "tests/recipe/test_counted.py::"
        "test_it_depends_on_no_micro_batch_and_survives_a_resume_within_a_line",
    ),
    "a micro-batch with class weights counts by its samples": (
        "recipe.loss",
        "weight = class_weights[targets].sum()",
        "weight = None",
        "tests/recipe/test_loss.py::"
        "test_random_partitions_give_the_loss_and_the_gradient_of_the_whole_batch",
    ),
    "soft targets count by the weights of their largest class": (
        "recipe.loss",
        "            return loss\n",
        "            return loss, class_weights[targets.argmax(1)].sum()\n",
        "tests/recipe/test_loss.py::test_two_ranks_with_class_weights_give_the_whole_batch",
    ),
    "balanced weights are not divided by the number of classes": (
        "recipe.class_weights",
        "len(labels) / (len(classes) * count)",
        "len(labels) / count",
        "tests/recipe/test_loss.py::test_balanced_weights_are_scikit_learns",
    ),
    "a head is trained with all that is below it": (
        "optim.trained",
        "parameter.requires_grad_(id(parameter) in chosen)",
        "parameter.requires_grad_(True)",
        "tests/recipe/test_trained.py::test_the_parameters_of_a_method_are_trained_and_no_other",
    ),
    "the patience of a run starts anew with each resume": (
        "runs.log",
        'self.patience.load_state_dict(state["patience"])',
        "pass",
        "tests/runs/test_patience.py::test_it_ends_where_it_would_have_after_a_resume_and_is_done_then",
    ),
    "a cosine is stretched in silence": (
        "recipe.optimizer",
        'if self.options.schedule != "cosine" or how == "stretch":',
        'if self.options.schedule != "cosine" or how in ("stretch", None):',
        "tests/runs/test_resume.py::"
        "test_a_cosine_asks_how_it_goes_on_and_shows_the_three_in_numbers",
    ),
    "a resume changes the contract": (
        "recipe.resume",
        "if value not in (has, saved.asked.get(name, has)):",
        "if False:",
        "tests/runs/test_resume.py::"
        "test_a_setting_that_decides_the_result_cannot_change"
        "[flags0---global-batch-size 128: the run in]",
    ),
    "a resume starts the epoch anew": (
        "data.loader",
        'self.next_update, self._batches = int(state["next_update"]), None',
        "self.next_update, self._batches = 0, None",
        "tests/runs/test_resume.py::"
        "test_a_resumed_run_is_the_unbroken_one_to_the_bit[1-SGD, EMA, sparse lines]",
    ),
    "the resumed update has the old schedule's rate": (
        "runs.session",
        '        refresh(self.parts["scheduler"])',
        "        pass",
        "tests/runs/test_resume.py::test_each_way_to_extend_a_cosine_has_the_rates_it_says",
    ),
    "ranks stop when they like": (
        "update.accumulation",
        "    if stop_sum:\n",
        "    agreed = stop\n    if False:\n",
        "tests/runs/test_resume.py::"
        "test_an_interrupt_on_one_rank_outweighs_a_time_limit_on_another",
    ),
    "DeepSpeed steps by its own count of micro-steps": (
        "update.sharding.zero",
        "            self.engine.set_gradient_accumulation_boundary(True)\n            try:",
        "            try:",
        "tests/update/sharding/test_zero.py::"
        "test_two_ranks_under_zero_give_the_update_of_one_process[ZeRO-2, bf16]",
    ),
    "each micro-step is DeepSpeed's last": (
        "update.sharding.zero",
        "self.engine.set_gradient_accumulation_boundary(last and not self.droppable)",
        "pass",
        "tests/update/sharding/test_zero.py::"
        "test_two_ranks_under_zero_give_the_update_of_one_process[ZeRO-3, SGD offloaded]",
    ),
    "DeepSpeed divides by its own number of micro-steps": (
        "update.sharding.zero",
        ", scale_wrt_gas=False)",
        ")",
        "tests/update/sharding/test_zero.py::"
        "test_two_ranks_under_zero_give_the_update_of_one_process[ZeRO-0, SGD]",
    ),
    "DeepSpeed divides by the number of ranks": (
        "update.sharding.zero",
        "divisor /= self._world_size",
        "pass",
        "tests/update/sharding/test_zero.py::"
        "test_two_ranks_under_zero_give_the_update_of_one_process[ZeRO-0, SGD]",
    ),
    "bf16 is asked for under DeepSpeed, and float32 runs": (
        "update.sharding.prepare",
        "        wrap_forward(model, accelerator)\n",
        "",
        "tests/update/sharding/test_zero.py::"
        "test_two_ranks_under_zero_give_the_update_of_one_process[ZeRO-2, bf16]",
    ),
    "DeepSpeed's own bf16 runs": (
        "update.sharding.precision",
        '    section["enabled"] = False\n',
        "",
        "tests/update/sharding/test_zero_config.py::"
        "test_deepspeed_reads_float32_while_the_accelerator_says_what_was_asked",
    ),
    "casts of weights outlive the forward that gathered them": (
        "update.transaction",
        "keeps = self.sharding.droppable",
        "keeps = True",
        "tests/update/sharding/test_zero.py::"
        "test_two_ranks_under_zero_give_the_update_of_one_process[ZeRO-3, bf16]",
    ),
    "FSDP2 divides by the number of ranks": (
        "update.sharding.fsdp",
        "(loss * self._world_size).backward()",
        "loss.backward()",
        "tests/update/sharding/test_fsdp.py::"
        "test_two_sharded_ranks_give_the_update_of_one_process[dtype1-1e-12-none]",
    ),
    "Accelerate clips at 1.0": (
        "update.sharding.zero_config",
        '    config["gradient_clipping"] = wanted\n',
        "",
        "tests/update/sharding/test_zero_config.py::"
        "test_auto_clipping_is_the_users_and_never_1[0.5-0.5]",
    ),
    "a base batch that was given and is the default is overridden": (
        "recipe.rate",
        "if not given or rule is None",
        "if rate.base_batch_size == 256 or rule is None",
        "tests/optim/test_scaling.py::test_the_recipe_s_rate_per_n_samples_is_swin_s",
    ),
    "rates of a batch schedule compound": (
        "recipe.growth",
        "[f for start, f in starts if start <= samples_seen][-1]",
        "__import__('math').prod(f for start, f in starts if start <= samples_seen)",
        "tests/recipe/test_growth.py::test_warmup_cosine_and_growth_compose_by_multiplication",
    ),
    "the batch grows an epoch late": (
        "batch.phases",
        "(phase.epoch - 1, phase.global_batch_size)",
        "(phase.epoch, phase.global_batch_size)",
        "tests/recipe/test_growth.py::"
        "test_a_growing_batch_is_what_the_schedule_says_in_updates_samples_and_rates",
    ),
    "a dropped update moves no statistic": (
        "update.transaction",
        'if step.outcome in ("written", "dropped"):',
        'if step.outcome == "written":',
        "tests/recipe/test_growth.py::"
        "test_a_dropped_update_moves_statistics_and_counters_and_no_weight",
    ),
    "a resume in the middle of an epoch decides again": (
        "noise.auto_batch",
        "if epoch == 0 or not first or done:",
        "if epoch == 0 or done:",
        "tests/recipe/test_auto_batch.py::test_in_the_middle_of_an_epoch_nothing_is_decided",
    ),
    "recompute with the spoilt list": (
        "update.checkpointing",
        "return plain(module, *_fresh(args), **_fresh(kwargs))",
        "return plain(module, *args, **kwargs)",
        "tests/update/test_checkpointing.py::"
        "test_a_family_without_a_hook_is_wrapped_and_nothing_changes[hrnet_w18_small]",
    ),
    "masks of the learning rate: warmup forgotten": (
        "optim.schedules",
        "if samples_seen < warmup_samples:\n            if",
        "if False:\n            if",
        "tests/optim/test_schedules.py::"
        "test_the_trace_of_learning_rates_follows_the_closed_form_for_every_batch_size[359]",
    ),
    "order depends on the rank": (
        "data.loader",
        "within, count = micro_batch.start, micro_batch.num_samples",
        "within, count = micro_batch.start + self.rank, micro_batch.num_samples",
        "tests/data/test_loader.py::test_no_plan_changes_samples_order_or_random_numbers",
    ),
    "augmentation keyed without the epoch": (
        "data.worker_side",
        "keyed_hash(self.seed, SAMPLE_SEED, epoch, index)",
        "keyed_hash(self.seed, SAMPLE_SEED, index)",
        "tests/data/test_loader.py::test_draws_differ_between_epochs_and_samples",
    ),
    "mixup across the cut": (
        "data.augment",
        "torch.arange(start + size - 1, start - 1, -1)",
        "torch.arange(len(labels) - 1 - start, len(labels) - 1 - start - size, -1)",
        "tests/data/test_augment.py::"
        "test_no_cut_into_micro_batches_changes_what_is_mixed[None-alphas1]",
    ),
    "accumulation steps that are not the plan's are taken": (
        "configs.against_plan",
        "if steps != plan.gradient_accumulation_steps:",
        "if False:",
        "tests/commands/test_configs_command.py::test_validate_takes_what_the_script_says",
    ),
    "the environment's accumulation steps are not seen": (
        "configs.resolve",
        "with clear_environment(), patch_environment(**variables):",
        "with clear_environment():",
        "tests/configs/test_resolve.py::"
        "test_a_key_beside_deepspeed_config_file_is_named_with_its_place[gradient_accumulation_steps]",
    ),
    "accelerate may replace the optimizer under offload": (
        "configs.make",
        '"zero_force_ds_cpu_optimizer": False',
        '"zero_force_ds_cpu_optimizer": True',
        "tests/configs/test_resolve.py::test_what_make_writes_is_what_is_shipped[zero3_offload]",
    ),
    "a hidden size is asked of a timm model": (
        "configs.make",
        '"stage3_prefetch_bucket_size": BUCKET',
        '"stage3_prefetch_bucket_size": "auto"',
        "tests/configs/test_resolve.py::test_what_make_writes_is_what_is_shipped[zero3]",
    ),
    "an arm need not state its norm batch": (
        "studies.checks",
        "if study.stated(place).get(NORM) is None:",
        "if False:",
        "tests/studies/test_study_files.py::"
        "test_a_fault_is_one_sentence_that_names_the_entry[no norm]",
    ),
    "a study's grid sees the test set": (
        "studies.tuning",
        '"test_split": "unused"}',
        '"test_split": "val"}',
        "tests/studies/test_running.py::"
        "test_a_grid_never_sees_the_images_that_the_study_is_judged_on[others0]",
    ),
    "a diverged run of a grid is its best": (
        "studies.tuning",
        "zip(values, results, strict=True) if r is not None]",
        "zip(values, [9e9 if r is None else r for r in results], strict=True)]",
        "tests/studies/test_running.py::"
        "test_the_best_of_a_grid_is_the_smallest_of_equals_and_no_diverged_one",
    ),
    "two workers take one run": (
        "studies.running",
        "        yield None\n",
        "        yield 0\n",
        "tests/studies/test_running.py::test_any_number_of_workers_share_the_runs_of_one_folder",
    ),
    "a diverged run of a study is run again": (
        "studies.folder",
        'ENDED = ("done", "diverged")',
        'ENDED = ("done",)',
        "tests/studies/test_running.py::"
        "test_a_failed_run_is_told_and_tried_again_and_a_diverged_one_is_a_result",
    ),
    "a diverged run of a study is a failed one": (
        "studies.folder",
        'return "diverged" if summary.get("diverged") is True else "failed"',
        'return "failed"',
        "tests/studies/test_running.py::"
        "test_a_failed_run_is_told_and_tried_again_and_a_diverged_one_is_a_result",
    ),
    "a folder of another study is written over": (
        "studies.folder",
        "    if differing:\n",
        "    if False:\n",
        "tests/studies/test_running.py::"
        "test_a_folder_of_another_study_is_refused_with_what_differs",
    ),
    "a signal reaches no run of a study": (
        "studies.running",
        "            child.terminate()\n\n\ndef prepare",
        "            pass\n\n\ndef prepare",
        "tests/studies/test_running.py::"
        "test_a_signal_ends_the_runs_in_good_order_and_the_study_goes_on",
    ),
    "a run's result is its best evaluation": (
        "studies.outcome",
        "median(value for value in values if value is not None)",
        "max(value for value in values if value is not None)",
        "tests/studies/test_outcome.py::"
        "test_it_is_the_median_of_the_last_evaluations_and_never_the_best",
    ),
    "updates to a target are known to the update": (
        "studies.to_target",
        "LEAST) / n + self.rounding",
        "LEAST) / n",
        "tests/studies/test_to_target.py::"
        "test_the_distance_of_two_evaluations_widens_the_interval_and_moves_no_fit",
    ),
    "a claim ends with its worker": (
        "studies.running",
        'pass_fds=(claim,) if os.name == "posix" else (),',
        "pass_fds=(),",
        "tests/studies/test_running.py::test_a_run_keeps_its_claim_though_its_worker_is_killed",
    ),
    "a study forgets what was pinned": (
        "commands.study",
        "sorted({*study.pinned, *typed})",
        "sorted(typed)",
        "tests/studies/test_study_command.py::test_a_study_goes_on_in_its_folder_as_it_was_begun",
    ),
    "the noise scale forgets that an epoch draws without replacement": (
        "noise.arithmetic",
        "scale_s / num_samples * (1 - repeat * share)",
        "scale_s / num_samples",
        "tests/noise/test_noise_arithmetic.py::"
        "test_a_unit_that_crosses_an_epoch_end_takes_little_from_the_estimate",
    ),
    "the noise scale's units all weigh their samples": (
        "noise.scale",
        "factor, update_sq = num_samples**3 / weight, grad_norm**2",
        "factor, update_sq = num_samples**2, grad_norm**2",
        "tests/noise/test_noise_scale.py::"
        "test_weights_of_the_loss_function_are_scaled_to_the_number_of_samples",
    ),
    "a loss scale enters the noise scale": (
        "noise.unit_norms",
        "        if self._scale is not None:\n",
        "        if False:\n",
        "tests/noise/test_noise_scale.py::test_neither_clipping_nor_a_loss_scale_enters",
    ),
    "a filler is a unit of the noise scale": (
        "noise.unit_norms",
        "(not isinstance(weight, Tensor) and weight == 0.0)",
        "(weight := weight or 3.0) == 0.0",
        "tests/noise/test_noise_scale.py::test_a_filler_counts_nothing",
    ),
    "AdaScale takes the sum for the mean": (
        "optim.adascale",
        "num_units * mean_sq) / (num_units - 1)",
        "mean_sq / num_units) / (num_units - 1)",
        "tests/optim/test_adascale.py::test_the_closed_form_is_fairscales_gain[3]",
    ),
    "a dropped update moves AdaScale's progress": (
        "optim.scheduler",
        "if dropped and isinstance(scheduler, AdaScaleLR):",
        "if False:",
        "tests/optim/test_adascale.py::"
        "test_a_dropped_update_moves_no_progress_and_takes_its_samples",
    ),
    "a second prepare replaces the first model": (
        "update.engine",
        "            raise failures.prepared_before()\n",
        "            pass\n",
        "tests/update/test_engine.py::"
        "test_a_second_prepare_is_refused_with_what_to_do_and_the_first_model_goes_on",
    ),
    "the user's random state is moved": (
        "data.worker_side",
        "generator.set_state(state[0])",
        "pass",
        "tests/data/test_loader.py::test_the_users_random_state_is_left_alone",
    ),
}


SEVERAL = re.compile(r" +(?=tests/)")  # between tests: a parameter's name may hold a space


def file_of(module: str, tree: Path = ROOT) -> Path:
    return tree.joinpath("lbaccel", *module.split(".")).with_suffix(".py")


def copy_to(tree: Path) -> Path:
    """All that tests read of the repository."""
    for folder in ("lbaccel", "tests", "accelerate_configs", "ds_configs"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def why_not_noticed(plain: tuple[int, str], mutated: tuple[int, str]) -> str | None:
    """None where pytest passes in the plain package and fails in the mutated one.

    Each run is (exit code, output); a negative code is the signal of a crash.
    """
    code, output = plain
    if code in (4, 5):
        return f"pytest finds no such test in the plain package:\n{output[-2000:]}"
    if code != 0:
        return f"red without the mutation too, pytest ended with {code}:\n{output[-4000:]}"
    code, output = mutated
    if code == TIMED_OUT:
        return f"the mutated run did not end:\n{output[-2000:]}"
    if code == 1 or code < 0:  # some crash torch's autograd
        return None
    return f"not noticed, pytest ended with {code}:\n{output[-2000:]}"


@pytest.fixture(scope="session")
def server():
    with closing(PytestServer()) as started:
        yield started


@pytest.fixture(scope="session")
def plain_run(server, tmp_path_factory):
    """What the plain package's run of a selection ends with: one run a file for all workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    tree = copy_to(tmp_path_factory.mktemp("plain"))

    def run(tests: str) -> tuple[int, str]:
        file = tests.partition("::")[0]
        path = shared / f"control_{hashlib.sha256(file.encode()).hexdigest()}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps(controls_of(file, server, tree)))
        code, output = json.loads(path.read_text())[tests]
        return code, output

    return run


def controls_of(file: str, server: PytestServer, tree: Path) -> dict[str, tuple[int, str]]:
    """The plain package's run of each selection in a file: all of them at once, if all pass."""
    selections = sorted({t for *_, t in MUTANTS.values() if t.partition("::")[0] == file})
    code, output = run_tests(server, tree, " ".join(selections), "-vv")
    if code != 0:
        return {tests: run_tests(server, tree, tests) for tests in selections}
    passed = re.findall(r"^(tests/.*) PASSED", output, re.MULTILINE)
    counts = {tests: sum(_selects(tests, test) for test in passed) for tests in selections}
    return {
        tests: (0, f"{count} passed" if count else "skipped") for tests, count in counts.items()
    }


def _selects(tests: str, test: str) -> bool:
    ends = ("[", "::")  # of a test with parameters, of a whole file
    return any(
        test == t or test.startswith(tuple(t + end for end in ends)) for t in SEVERAL.split(tests)
    )


def run_tests(server: PytestServer, tree: Path, tests: str, *flags: str) -> tuple[int, str]:
    return server.run(tree, "-x", "-q", "-p", "no:cacheprovider", *flags, *SEVERAL.split(tests))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, server, plain_run, tmp_path):
    module, right, naive, tests = MUTANTS[name]
    plain = plain_run(tests)
    if plain[0] == 0 and not re.search(r"\d+ passed", plain[1]):
        # only an extra that is missing excuses that: with all of them there, each mutant is run
        assert find_spec("deepspeed") is None, f"skipped in the plain package: {tests}"
        pytest.skip(f"not run, as deepspeed is not installed: {tests}")
    path = file_of(module, copy_to(tmp_path))
    source = path.read_text()
    assert right in source, f"{module} no longer holds {right!r}"
    path.write_text(source.replace(right, naive, 1))
    why = why_not_noticed(plain, run_tests(server, tmp_path, tests))
    assert why is None, f"{tests}: {why}"


def test_each_mutants_line_stands_in_its_module_and_its_test_in_its_file():
    wrong = []
    for name, (module, right, naive, tests) in MUTANTS.items():
        path = file_of(module)
        if not path.exists() or right not in path.read_text() or right == naive:
            wrong.append(f"{name}: {module} does not hold {right!r}")
        for test in SEVERAL.split(tests):
            file, _, function = test.partition("::")
            function = function.partition("[")[0]
            if not (ROOT / file).exists() or f"def {function}" not in (ROOT / file).read_text():
                wrong.append(f"{name}: there is no {test}")
    assert not wrong, "\n".join(wrong)


def test_pytest_finds_each_mutants_test():
    """A new parameter renames a test: its file holds the function still, pytest has no such id."""
    if find_spec("deepspeed") is None:
        pytest.skip("files that need deepspeed hold no tests without it")
    selection = {t for *_, tests in MUTANTS.values() for t in SEVERAL.split(tests)}
    command = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    run = subprocess.run((*command, *sorted(selection)), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, "\n".join(re.findall("ERROR.*", run.stdout + run.stderr))


@pytest.mark.parametrize(
    ("plain", "mutated", "says"),
    [
        (0, 1, None),
        (0, -11, None),
        (0, 0, "not noticed"),
        (0, 2, "not noticed"),
        (0, TIMED_OUT, "did not end"),
        (1, 1, "red without the mutation"),
        (-11, -11, "red without the mutation"),
        (TIMED_OUT, 1, "red without the mutation"),
        (4, 4, "no such test"),
        (5, 5, "no such test"),
    ],
)
def test_a_mutant_counts_as_noticed_only_beside_a_run_that_passes(plain, mutated, says):
    why = why_not_noticed((plain, ""), (mutated, ""))
    assert why is None if says is None else why is not None and says in why


OF_ONE_FILE = ("tests/f.py", "tests/f.py::t", "tests/f.py::s[a b]", "tests/f.py::u")
VERBOSE = """
tests/f.py::t[1] PASSED        [ 20%]
tests/f.py::t[2] PASSED        [ 40%]
tests/f.py::s[a b] PASSED      [ 60%]
tests/f.py::tt PASSED          [ 80%]
tests/f.py::u SKIPPED (absent) [100%]
4 passed, 1 skipped
"""


class Answers:
    """In the server's place: what each run of pytest ends with."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def run(self, tree, *arguments):
        self.asked.append([a for a in arguments if a.startswith("tests/")])
        return self.answers.pop(0)


@pytest.fixture
def mutants_of_one_file(monkeypatch):
    rows = {name: ("m", "a", "b", name) for name in (*OF_ONE_FILE, "tests/other.py::t")}
    monkeypatch.setattr(sys.modules[__name__], "MUTANTS", rows)


def test_controls_of_a_file_are_one_run_where_all_pass(mutants_of_one_file, tmp_path):
    server = Answers((0, VERBOSE))
    found = controls_of("tests/f.py", server, tmp_path)
    says = ("4 passed", "2 passed", "1 passed", "skipped")
    assert found == {tests: (0, what) for tests, what in zip(OF_ONE_FILE, says, strict=True)}
    assert server.asked == [sorted(OF_ONE_FILE)]


def test_controls_of_a_file_are_run_one_by_one_where_one_does_not_pass(
    mutants_of_one_file, tmp_path
):
    answers = [(0, "1 passed"), (1, "1 failed"), (-11, ""), (0, "2 passed")]
    server = Answers((1, "1 failed"), *answers)
    found = controls_of("tests/f.py", server, tmp_path)
    assert found == dict(zip(sorted(OF_ONE_FILE), answers, strict=True))
    assert server.asked[1:] == [[tests] for tests in sorted(OF_ONE_FILE)]
