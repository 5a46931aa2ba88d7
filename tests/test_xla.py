"""Training on torch_xla's CPU device: compiles, executions, and the same numbers as elsewhere."""

import copy
import importlib.util
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

import layers
import trm_model
from checkpoint_manager import load_checkpoint
from config import load_config
from device import Device
from tests import exact
from tests.helpers import (
    ROOT,
    WITH_KIT,
    CommandTest,
    XLATest,
    random_pairs,
    write_config,
    write_split,
)
from tests.processes import run
from tests.test_model import admitted, no_minimum, on_device, small_model
from train_state import TrainState, load_dataset

sys.path.insert(0, str(ROOT / "analysis"))
import tpu_hlo

ATTENTION = ("model.mlp_t=false", "model.pos_encodings=rope")


@unittest.skipUnless(importlib.util.find_spec("torch_xla"), "torch_xla is not installed here")
class XLATrainingTest(CommandTest):
    def check_counts(self, run_name, *overrides, stages=()):
        """20 steps in one process, then the rest of the 30 in another one.

        stages: the steps after which a further stage of a curriculum begins.
        A record at each step, evaluations after 10 and 20, checkpoints after 7, 10, 14 and 20, and
        a learning rate that changes at every step.
        """
        flags = (
            "--run_name",
            run_name,
            "device=xla_cpu",
            "training.epochs=3",
            "logging.interval_steps=1",
            "evaluation.interval_epochs=1",
            "training.lr_warmup_steps=5",
            "training.lr_min_ratio=0.1",
            *overrides,
        )
        self.train(*flags, "--max_steps", "20")
        self.train(*flags)
        records = self.records(run_name, timing=True)
        training = {r["step"]: r for r in records if r["split"] == "train"}
        self.assertEqual(list(training), list(range(1, 31)))
        self.assertEqual(len({r["lr"] for r in training.values()}), 30)
        # an evaluation of 20 puzzles: two batches of 16, three supervision steps each
        evaluation = 2 * 3
        for step, record in training.items():
            evaluations, since = (
                (0, step) if step <= 10 else (1, step) if step <= 20 else (0, step - 20)
            )
            begun = [begin for begin in stages if begin < step and (begin >= 20) == (step > 20)]
            with self.subTest(step=step):
                # the training step, of each stage; the evaluation step once it has run
                self.assertEqual(record["xla_compiles"], 1 + len(begun) + evaluations)
                # The runtime counts an execution a moment after its results are there. So the last
                # one may be missing, but none may be too many.
                expected = since + evaluations * evaluation
                self.assertIn(record["xla_executions"], (expected - 1, expected))
        self.assertEqual(
            [(r["step"], r["weights"], r["count"]) for r in records if r["split"] == "test"],
            [(10, "ema", 20), (20, "ema", 20), (30, "ema", 20), (30, "ema", 50), (30, "raw", 50)],
        )

    def test_one_compile_and_one_execution_a_step_with_the_token_mlp(self):
        self.check_counts("mlp")

    def test_one_compile_and_one_execution_a_step_with_attention(self):
        self.check_counts("attention", *ATTENTION)

    def test_one_compile_with_every_option(self):
        self.check_counts(
            "options",
            "training.grad_accumulation_steps=2",
            "training.grad_clip_norm=0.5",
            "training.optimizer=adamw",
            "model.pos_encodings=learned",
            "model.halt_exploration_prob=0.5",
            "model.activation_checkpointing=true",
        )

    def test_one_compile_for_each_stage_of_a_curriculum(self):
        """Stages begin after 6, 12 and 24 steps; the second process begins in the third one."""
        self.check_counts(
            "curriculum",
            "training.curriculum=[{begin: 0, H_cycles: 1, L_cycles: 1}, "
            "{begin: 0.2, H_cycles: 1, L_cycles: 2}, {begin: 0.4, H_cycles: 2, L_cycles: 2}, "
            "{begin: 0.8, H_cycles: 2, L_cycles: 1}]",
            "training.step_loss_decay=0.7",
            "training.ponder_cost=0.1",
            "data.augmentations=3",
            stages=(6, 12, 24),
        )

    def test_same_training_as_on_the_cpu(self):
        """In float32, from one checkpoint of each device on to the same step on the other."""
        flags = (
            "model.forward_dtype=float32",
            "logging.interval_steps=1",
            "checkpoint.keep_last_n=9",
        )
        for first, second in (("cpu", "xla_cpu"), ("xla_cpu", "cpu")):
            name = f"{first}_then_{second}"
            self.train("--run_name", name, "--max_steps", "8", f"device={first}", *flags)
            self.assertIn(
                "goes on after step 8",
                self.train("--run_name", name, "--max_steps", "20", f"device={second}", *flags),
            )
        ours, theirs = self.records("cpu_then_xla_cpu"), self.records("xla_cpu_then_cpu")
        self.assertEqual([r["step"] for r in ours if r["split"] == "train"], list(range(1, 21)))
        for one, other in zip(ours, theirs, strict=True):
            if one["split"] == "train":
                self.assertAlmostEqual(
                    one["loss"], other["loss"], delta=0.01 * one["loss"], msg=str(one["step"])
                )
        start = load_checkpoint(self.checkpoint("cpu_then_xla_cpu", 7))["model"]
        ends = [
            load_checkpoint(self.checkpoint(name, 20))["model"]
            for name in ("cpu_then_xla_cpu", "xla_cpu_then_cpu")
        ]
        changes = [torch.cat([(end[key] - start[key]).flatten() for key in start]) for end in ends]
        self.assertGreater(torch.cosine_similarity(*changes, dim=0).item(), 0.99)

    def test_four_replicas_in_one_program_train_as_one_worker(self):
        """In float32.

        The first step agrees as far as the rounding of float32 allows, later ones as far as
        AdamATan2's first updates do.
        """
        files = {}
        for name, script in (("four", "xla_replicas"), ("one", "one_worker")):
            files[name] = self.folder / f"{name}.pt"
            program = [f"tests/programs/{script}.py", str(self.config), str(files[name])]
            command = [sys.executable, *program, "model.forward_dtype=float32"]
            run(self, command, environment=WITH_KIT)
        four, one = (torch.load(files[name]) for name in ("four", "one"))
        self.assertEqual((four["devices"], four["sharding"]), (4, "{devices=[4,1,1]0,1,2,3}"))
        for step, (ours, theirs) in enumerate(zip(four["steps"], one["steps"], strict=True)):
            self.assertTrue(torch.equal(ours["halted"], theirs["halted"]))
            for name in ("totals", "z_H"):
                far = exact.distance(ours[name], theirs[name].double())
                self.assertLess(far, one["tolerance"] if step == 0 else 0.02, f"{name}, {step + 1}")
        for name in ("weights", "ema"):
            start = torch.cat([w.flatten() for w in one["start"]])
            changes = [
                torch.cat([w.flatten() for w in run["steps"][-1][name]]) - start
                for run in (four, one)
            ]
            self.assertGreater(torch.cosine_similarity(*changes, dim=0).item(), 0.99, name)

    def test_every_product_of_a_float32_run_is_of_float32(self):
        """In all that training, its evaluations and --eval_only compile.

        The class Products checks what each kind of model traces.
        """
        dump = self.folder / "dump"
        flags = (
            "--run_name",
            "float32",
            "device=xla_cpu",
            "training.epochs=0.2",
            "evaluation.interval_epochs=0.2",
        )
        with mock.patch.dict(
            os.environ,
            XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_dump_to={dump} --xla_dump_hlo_as_text",
        ):
            self.train(*flags)
            trained = list(dump.glob("*before_optimizations.txt"))
            self.train(*flags, "--eval_only", "evaluation.batch_size=10")
        texts = {path: path.read_text() for path in dump.glob("*before_optimizations.txt")}
        with_products = [path for path, text in texts.items() if products(text)]
        self.assertEqual(
            (len(with_products), len([path for path in with_products if path not in trained])),
            (3, 1),
        )
        for text in texts.values():
            for instruction, _ in products(text):
                self.assertIn("operand_precision={highest,highest}", instruction.rest)


def products(text):
    """[(Instruction, its computation)] of the matrix products in a program as it was traced.

    Also of what may hide some of them.
    """
    return [
        (instruction, computation)
        for computation in tpu_hlo.parse(text)[0].values()
        for instruction in computation.values()
        if instruction.opcode in ("dot", "convolution", "custom-call")
    ]


class Products(XLATest):
    """A TPU rounds the operands of a float32 product to bfloat16 unless told otherwise.

    The way to tell it is the highest precision.
    """

    def traced(self, *overrides):
        """The products of a training step and of an evaluation step."""
        import torch_xla

        config = load_config(self.path, list(overrides))
        device = Device("xla_cpu")
        device.set_matmul_precision(config.model.forward_dtype)
        run = TrainState(config, device, load_dataset(config, "train"))
        batch = device.put(run.host_batch(run.loader.batch(0)))
        torch_xla.sync()
        found = []
        run.train_step(batch)
        found += products(
            torch_xla._XLAC._get_xla_tensors_hlo(
                [*run.model.parameters(), run.model.puzzle_emb.weights, run.totals, *run.carry]
            )
        )
        with torch.no_grad():
            carry, scores = trm_model.evaluation_step(
                run.model, device.put(run.model.empty_carry(8)), batch
            )
        found += products(torch_xla._XLAC._get_xla_tensors_hlo([*carry, scores]))
        torch_xla._XLAC._clear_pending_irs(str(device.torch))
        self.assertGreater(len(found), 30)
        return found

    def test_of_a_float32_run(self):
        for overrides in (
            (),
            ATTENTION,
            (
                "model.activation_checkpointing=true",
                "training.grad_accumulation_steps=2",
                "training.pallas_kernels=true",
            ),
        ):
            for instruction, _ in self.traced(*overrides):
                self.assertIn("operand_precision={highest,highest}", instruction.rest)

    def test_of_a_bfloat16_run(self):
        """No product asks for more.

        And none rounds what was float32, but for attention's shares: the halting head and the sums
        of the puzzle rows' gradients are no products.
        """
        for overrides in ((), ATTENTION):
            for instruction, computation in self.traced("model.forward_dtype=bfloat16", *overrides):
                self.assertNotIn("operand_precision", instruction.rest)
                for operand in instruction.operands if not overrides else ():
                    self.assertRegex(
                        self.made_from(operand, computation), r"^(bf16|pred)\[", instruction
                    )

    def made_from(self, name, computation):
        """The shape of what an operand is another layout or dtype of."""
        instruction = computation[name]
        while instruction.opcode in (
            "convert",
            "transpose",
            "reshape",
            "broadcast",
        ) and not instruction.shape.startswith("bf16"):
            instruction = computation[instruction.operands[0]]
        return instruction.shape

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        write_split(Path(self.folder.name) / "data" / "train", *random_pairs(4, 8))
        self.path = write_config(
            Path(self.folder.name) / "run.yaml",
            f"data: {{dataset_path: {self.folder.name}/data}}\n" + SMALL,
        )


class ReplayTest(XLATest):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        write_split(Path(self.folder.name) / "data" / "train", *random_pairs(4, 8))
        self.path = write_config(
            Path(self.folder.name) / "run.yaml",
            f"data: {{dataset_path: {self.folder.name}/data}}\n" + SMALL,
        )

    def steps(self, replayed, *overrides):
        """(everything that a run holds after each of six steps, how often a step was traced).

        A new logging interval begins in the middle.
        """
        config = load_config(self.path, ["training.lr_warmup_steps=4", *overrides])
        device, seen, traced = Device("xla_cpu"), [], []
        run = TrainState(config, device, load_dataset(config, "train"))

        def function(batch):
            traced.append(batch)
            run.train_step(batch)

        step, batches = (
            device.traced_once(function, run.tensors) if replayed else function,
            iter(run.loader),
        )
        for _ in range(6):
            step(device.put(run.host_batch(next(batches))))
            device.end_step()
            run.step += 1
            seen.append(device.fetch(run.tensors()))
            if run.step == 3:
                run.start_interval()
        batches.close()
        return seen, len(traced)

    def test_a_replayed_step_is_the_traced_one(self):
        for overrides in (
            (),
            (
                "training.grad_accumulation_steps=2",
                "training.optimizer=adamw",
                "training.grad_clip_norm=0.5",
                "model.activation_checkpointing=true",
            ),
            ("model.forward_dtype=bfloat16", *ATTENTION),
        ):
            with self.subTest(overrides):
                (traced, six), (replayed, one) = (
                    self.steps(False, *overrides),
                    self.steps(True, *overrides),
                )
                self.assertEqual((six, one), (6, 1))
                for step, (ours, theirs) in enumerate(zip(replayed, traced, strict=True)):
                    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                        self.assertTrue(torch.equal(a, b), (step, place))
                self.assertFalse(torch.equal(replayed[4][0], replayed[5][0]))

    def test_a_changed_tensors_memory_goes_to_its_successor(self):
        config = load_config(self.path, [])
        device = Device("xla_cpu")
        run = TrainState(config, device, load_dataset(config, "train"))
        step, batches = run.run_step, iter(run.loader)
        step(device.put(run.host_batch(next(batches))))
        old = [tensor.detach() for tensor in run.model.parameters()]
        step(device.put(run.host_batch(next(batches))))
        batches.close()
        for tensor in old:
            with self.assertRaisesRegex(RuntimeError, "HasValue"):  # it has no memory any more
                tensor.cpu()

    def test_activation_checkpointing_gives_the_same_gradients(self):
        """There is a barrier before each block is computed again.

        Otherwise the compiler would use the values that it has. docs/tpu_step.md has the effect on
        a TPU.
        """
        import torch_xla

        for changes in (dict(), dict(mlp_t=False, pos_encodings="rope")):
            barriers, results = [], []
            for on in (False, True):
                model = small_model(activation_checkpointing=on, **changes)
                carry = admitted(model)
                rows, carry = (
                    model.puzzle_rows(carry).to(self.device).requires_grad_(),
                    trm_model.Carry(*(t.to(self.device) for t in carry)),
                )
                on_device(model, self.device)
                loss, _, after = trm_model.act_step(model, carry, rows, no_minimum(carry))
                results.append(
                    [
                        loss,
                        after.z_H,
                        after.z_L,
                        *torch.autograd.grad(loss, [*model.parameters(), rows]),
                    ]
                )
                barriers.append(
                    torch_xla._XLAC._get_xla_tensors_hlo(results[-1]).count(" opt-barrier(")
                )
                torch_xla.sync()
            self.assertEqual(barriers, [0, 2 * (2 + 1)])
            for ours, plain in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(ours.cpu(), plain.cpu(), rtol=1e-5, atol=1e-5)

    def test_swiglu_in_bfloat16(self):
        """Values and gradients of both axes are as near to float64 as those of the plain CPU."""
        import xla_mixing

        torch.manual_seed(0)
        x, grad = torch.randn(3, 40, 24).bfloat16(), torch.randn(3, 40, 24)
        for axis, dim in ((1, 40), (2, 24)):
            swiglu, errors = layers.SwiGLU(dim, 4.0, torch.Generator().manual_seed(1)), {}
            for name, device, dtype in (
                ("exact", "cpu", torch.float64),
                ("plain", "cpu", torch.bfloat16),
                ("xla", self.device, torch.bfloat16),
            ):
                module = copy.deepcopy(swiglu).to(device)
                if name == "exact":
                    module.double()
                given = x.clone().to(device, dtype).requires_grad_()
                if name == "xla":
                    module.mix = xla_mixing.mix
                result = module(given, module.weights(), axis)
                result.backward(grad.to(result))
                errors[name] = [
                    t.detach().cpu().double()
                    for t in (result, given.grad, *(p.grad for p in module.parameters()))
                ]
            for precise, plain, xla in zip(*errors.values(), strict=True):
                self.assertEqual(precise.shape, xla.shape)
                self.assertLess(
                    (xla - precise).abs().max().item(),
                    1.5 * (plain - precise).abs().max().item(),
                    axis,
                )


class StepOfAReplica(XLATest):
    def test_one_all_reduce_and_the_same_program_on_every_rank(self):
        """Of eight replicas, traced in one process.

        One all-reduce adds up gradients, puzzle rows and metrics. What a replica's rank decides
        (its slots, whether it keeps the average) is no part of the program.
        """
        os.environ["XLA_ALWAYS_ALLREDUCE"] = "1"  # in a process alone it would be left out
        write_split(Path(self.folder.name) / "data" / "train", *random_pairs(4, 8))
        path = write_config(
            Path(self.folder.name) / "run.yaml",
            f"data: {{dataset_path: {self.folder.name}/data}}\n" + SMALL,
        )
        for strategy in ("every_worker", "rank0"):
            programs = {}
            for rank in (0, 5):
                config = load_config(path, [f"training.ema_strategy={strategy}"])
                device = Device("xla_cpu")
                device.workers.rank, device.workers.world_size = rank, 8
                run = TrainState(config, device, load_dataset(config, "train"))
                batch = device.put(run.host_batch(next(iter(run.loader))))
                device.end_step = lambda: programs.setdefault(
                    rank, self.program(run)
                )  # what would be compiled
                run.train_step(batch)
                device.end_step()
                Device.end_step(
                    device
                )  # run it, or the next all-reduce would be chained to this one
            self.assertEqual(len(re.findall(r" all-reduce\(", programs[0])), 1)
            self.assertEqual(programs[0], programs[5])

    def program(self, run):
        import torch_xla

        return torch_xla._XLAC._get_xla_tensors_hlo(
            [*run.model.parameters(), run.totals, run.carry.z_H]
        )

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)


SMALL = """
model:
  hidden_size: 32
  num_heads: 4
  puzzle_emb_ndim: 32
  puzzle_emb_len: 1
  H_cycles: 2
  L_cycles: 1
  halt_max_steps: 4
  forward_dtype: float32
training: {global_batch_size: 8, epochs: 100}
"""


if __name__ == "__main__":
    unittest.main()
