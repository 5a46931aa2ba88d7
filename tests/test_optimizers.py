"""Optimizers, schedule, weight averaging, and the update of one training step."""

import copy
import io
import math
import unittest

import numpy as np
import torch

import trm_model
from adam_atan2 import AdamATan2, PuzzleEmbeddingSGD, bias_correction, lr_at
from checkpoint_manager import load_checkpoint
from config import ModelConfig, load_config
from data_loader_tpu import SudokuDatasetTPU
from device import Device
from ema_distributed import EMADistributed
from tests.helpers import FolderTest, random_pairs, write_config, write_split
from train_state import TOTALS, TrainState, settle_forward_dtype

torch.set_num_threads(
    1
)  # tensors are tiny: on a busy machine waiting for a second thread costs fifty times the work


def random_params(seed=0):
    stream = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=stream))
        for shape in ((5, 3), (7,), (2, 2, 2))
    ]


def set_grads(params, step):
    """Gradients of very different sizes, some of them zero."""
    stream = torch.Generator().manual_seed(100 + step)
    for k, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=stream) * 10.0 ** (3 * (k - 1))
        p.grad.view(-1)[0] = 0


class AdamATan2Test(unittest.TestCase):
    def test_formula(self):
        params = random_params()
        for settings in (
            {"betas": (0.9, 0.95), "weight_decay": 1.0},
            {"betas": (0.5, 0.99), "weight_decay": 0.0},
        ):
            expected = [p.detach().numpy().astype(np.float64) for p in params]
            m, v = [0 * p for p in expected], [0 * p for p in expected]
            optimizer = AdamATan2(params, **settings)
            (beta1, beta2), decay = settings.values()
            for t in range(1, 8):
                lr = 0.01 * t
                set_grads(params, t)
                optimizer.step(torch.tensor(lr) if t % 2 else lr)
                for k, p in enumerate(params):
                    g = p.grad.numpy().astype(np.float64)
                    expected[k] *= 1 - lr * decay
                    m[k] = beta1 * m[k] + (1 - beta1) * g
                    v[k] = beta2 * v[k] + (1 - beta2) * g * g
                    expected[k] -= (
                        lr
                        / (1 - beta1**t)
                        * np.arctan2(m[k], np.sqrt(v[k]) / np.sqrt(1 - beta2**t))
                    )
                    np.testing.assert_allclose(
                        p.detach().numpy(), expected[k], rtol=2e-6, atol=2e-6, err_msg=f"step {t}"
                    )

    def test_bias_correction(self):
        t = torch.arange(1.0, 3000.0)
        for beta in (0.0, 0.5, 0.9, 0.95, 0.999, 0.99999):
            exact = 1 - beta ** t.double()
            self.assertLess(
                ((bias_correction(beta, t).double() - exact) / exact).abs().max().item(), 2e-7, beta
            )

    def test_size_of_the_first_update(self):
        """It is atan2(m, sqrt(v_hat)) = atan2(0.1 g, |g|), whatever the scale of g.

        Zero stays zero.
        """
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = AdamATan2([p])
        p.grad = torch.tensor([1e-12, -1e12, 3.0, 0.0])
        optimizer.step(0.5)
        update = 0.5 / 0.1 * math.atan2(0.1, 1)
        np.testing.assert_allclose(p.detach().numpy(), [-update, update, -update, 0], rtol=1e-5)

    def test_state_dict_continues_bit_for_bit(self):
        params, twin = random_params(), random_params()
        optimizer = AdamATan2(params, weight_decay=0.1)
        for t in range(3):
            set_grads(params, t)
            optimizer.step(0.01)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = AdamATan2(twin, weight_decay=0.1)
        again.load_state_dict(torch.load(file, weights_only=True))
        for mine, theirs in zip(params, twin):
            theirs.data.copy_(mine.data)
        for t in range(3, 6):
            for each, each_optimizer in ((params, optimizer), (twin, again)):
                set_grads(each, t)
                each_optimizer.step(0.01)
        for mine, theirs in zip(params, twin):
            self.assertTrue(torch.equal(mine, theirs))
        self.assertEqual(optimizer.state[params[0]]["step"].item(), 6)

    def test_refuses_another_models_state(self):
        with self.assertRaises(ValueError):
            AdamATan2(random_params()).load_state_dict(AdamATan2(random_params()[:2]).state_dict())


class PuzzleEmbedding(unittest.TestCase):
    def test_occurrences_are_summed_before_the_sign(self):
        weights = torch.arange(12.0).reshape(4, 3)
        start = weights.clone()
        grads = torch.tensor(
            [[1.0, -1.0, 0.5], [-3.0, 0.4, 0.5], [1.0, 0.4, -1.0], [2.0, -2.0, 0.0]]
        )
        optimizer = PuzzleEmbeddingSGD(weights, weight_decay=0.5)
        # as from two workers: sums of sums
        parts = [
            optimizer.row_sums(torch.tensor(ids), part)
            for ids, part in (([1, 1], grads[:2]), ([1, 3], grads[2:]))
        ]
        optimizer.step(*(a + b for a, b in zip(*parts)), 0.1)
        signs = torch.tensor(
            [[0.0, 0, 0], [-1, -1, 0], [0, 0, 0], [1, -1, 0]]
        )  # of the sums -1, -0.2, 0
        seen = torch.tensor([[0.0], [1], [0], [1]])
        self.assertTrue(
            torch.allclose(weights, start * (1 - 0.1 * 0.5 * seen) - 0.1 * signs, atol=1e-6)
        )
        self.assertTrue(torch.equal(weights[[0, 2]], start[[0, 2]]))
        # a zero gradient moves nothing, but the row decays
        self.assertAlmostEqual(weights[3, 2].item(), 11 * 0.95, places=5)

    def test_in_place_and_with_tensors(self):
        weights = torch.ones(3, 2)
        optimizer, address = PuzzleEmbeddingSGD(weights), weights.data_ptr()
        optimizer.step(
            *optimizer.row_sums(torch.tensor([2], dtype=torch.int32), torch.tensor([[5.0, -5.0]])),
            torch.tensor(0.25),
        )
        self.assertEqual(weights.tolist(), [[1, 1], [1, 1], [0.75, 1.25]])
        self.assertEqual(optimizer.weights.data_ptr(), address)


class Schedule(unittest.TestCase):
    def test_values(self):
        for step, expected in [
            (1, 0.5e-4),
            (5, 2.5e-4),
            (9, 4.5e-4),
            (10, 5e-4),
            (11, None),
            (55, 2.75e-4),
            (100, 0.5e-4),
            (150, 0.5e-4),
        ]:
            found = lr_at(step, 5e-4, 10, 100, 0.1)
            expected = (
                5e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2)
                if expected is None
                else expected
            )
            self.assertAlmostEqual(found, expected, delta=1e-12, msg=f"step {step}")
        for step in (10, 50, 100):
            self.assertEqual(lr_at(step, 3e-4, 10, 100, 1.0), 3e-4)
        self.assertEqual(lr_at(1, 3e-4, 0, 100, 1.0), 3e-4)
        self.assertAlmostEqual(lr_at(100, 3e-4, 10, 100, 0.0), 0.0, delta=1e-15)
        self.assertEqual(lr_at(7, 3e-4, 10, 5, 1.0), 3e-4 * 7 / 10)  # a run shorter than its warmup

    def test_it_never_rises_after_the_warmup(self):
        rates = [lr_at(step, 1.0, 20, 200, 0.25) for step in range(1, 201)]
        self.assertTrue(all(a < b for a, b in zip(rates[:19], rates[1:20])))
        self.assertTrue(all(a >= b for a, b in zip(rates[19:], rates[20:])))


class Averaging(unittest.TestCase):
    def model(self):
        return trm_model.TinyRecursiveModel(
            ModelConfig(hidden_size=16, puzzle_emb_ndim=16, puzzle_emb_len=1, L_layers=1), 16, 6, 3
        )

    def test_formula(self):
        model = self.model()
        ema, expected = (
            EMADistributed(model, 0.75, Device("cpu")),
            [p.detach().double().numpy() for p in model.parameters()],
        )
        for _ in range(4):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            before = [p.clone() for p in model.parameters()]
            ema.update_in_step(model)
            expected = [
                0.75 * e + 0.25 * p.detach().double().numpy()
                for e, p in zip(expected, model.parameters())
            ]
            self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, model.parameters())))
        for p, e in zip(ema.module.parameters(), expected):
            np.testing.assert_allclose(p.numpy(), e, rtol=1e-6, atol=1e-6)

    def test_buffers_are_shared_and_parameters_are_not(self):
        model = self.model()
        ema = EMADistributed(model, 0.5, Device("cpu"))
        for (name, ours), theirs in zip(
            ema.module.named_parameters(), model.parameters(), strict=True
        ):
            self.assertNotEqual(ours.data_ptr(), theirs.data_ptr(), name)
            self.assertFalse(ours.requires_grad)
            self.assertTrue(theirs.requires_grad)
        names = {name for name, _ in ema.module.named_buffers()}
        self.assertEqual(names, {"puzzle_emb.weights", "H_init", "L_init"})
        for (name, ours), theirs in zip(ema.module.named_buffers(), model.buffers(), strict=True):
            self.assertEqual(ours.data_ptr(), theirs.data_ptr(), name)
        model.puzzle_emb.weights[1] = -0.5
        self.assertEqual(ema.module.puzzle_emb.weights[1, 0].item(), -0.5)


class TrainingStep(FolderTest):
    def setUp(self):
        super().setUp()
        write_split(self.folder / "data" / "train", *random_pairs(4, 8))
        self.dataset = SudokuDatasetTPU(self.folder / "data", "train")
        self.path = write_config(
            self.folder / "run.yaml",
            f"""
device: cpu
data: {{dataset_path: {self.folder / "data"}}}
model:
  hidden_size: 32
  num_heads: 4
  puzzle_emb_ndim: 32
  puzzle_emb_len: 1
  H_cycles: 2
  L_cycles: 2
  halt_max_steps: 4
  forward_dtype: float32
training: {{global_batch_size: 8, epochs: 100, lr: 1e-2, puzzle_emb_lr: 1e-2, lr_warmup_steps: 0}}
""",
        )

    def run_of(self, *overrides):
        config = load_config(self.path, overrides)
        return TrainState(config, Device("cpu"), self.dataset)

    def steps(self, run, count, watch=None):
        """Make `count` training steps as the loop does.

        watch(run): called where the optimizer's step would begin.
        """
        batches, optimizer_step = iter(run.loader), run.optimizer.step

        def step(lr):
            if watch:
                watch(run)
            optimizer_step(lr)

        run.optimizer.step = step
        for _ in range(count):
            run.train_step(run.device.put(run.host_batch(next(batches))))
            run.step += 1
        batches.close()
        return run

    def test_a_record_in_which_nobody_halted_has_no_accuracies(self):
        run = self.run_of()
        run.step, run.interval_steps, run.interval_seconds = 2, 2, 1.0
        totals = dict.fromkeys(TOTALS, 0.0) | {"lm_loss": 32.0}
        for count, expected in ((0.0, None), (4.0, 0.0)):
            record = run.record({**totals, "count": count}, 1e12)
            for key in ("cell_accuracy", "exact_accuracy", "q_halt_accuracy", "mean_steps"):
                self.assertEqual(record[key], expected, key)
            self.assertEqual(record["lm_loss"], 2)  # of two steps with 8 slots
        run.device.workers.world_size = 2  # of which each has this peak
        record = run.record({**totals, "count": 0.0}, 1e12)
        self.assertGreater(record["mfu"], 0)
        self.assertEqual(record["mfu"], record["model_flops_per_second"] / 1e12 / 2)

    def test_accumulated_gradients_are_those_of_the_whole_batch(self):
        recorded = []
        for parts in (1, 2, 4):
            run, grads = self.run_of(f"training.grad_accumulation_steps={parts}"), []
            puzzle_step = run.puzzle_optimizer.step
            with torch.no_grad():  # else halting is one slot's like the other's
                run.model.q_head.weight[0].copy_(torch.linspace(-1, 1, 32))
                run.model.q_head.bias[0] = 0.0

            def puzzle(row_grads, occurrences, lr):
                grads.extend((row_grads, occurrences))
                puzzle_step(row_grads, occurrences, lr)

            run.puzzle_optimizer.step = puzzle
            self.steps(
                run, 1, lambda run: grads.extend(p.grad.clone() for p in run.model.parameters())
            )
            recorded.append([*grads, run.totals, *run.carry, *run.model.parameters()])
            self.assertTrue(all(p.grad is None for p in run.model.parameters()))
        whole, halves, quarters = recorded
        names = [name for name, _ in run.model.named_parameters()]
        labels = [
            *(f"gradient of {n}" for n in names),
            "row gradients",
            "occurrences",
            "totals",
            *run.carry._fields,
            *(f"weight {n}" for n in names),
        ]
        self.assertEqual(len(labels), len(whole))
        self.assertTrue(all(t.any() for t in whole[: len(names)]))
        for parts in (halves, quarters):
            for label, a, b in zip(labels, whole, parts, strict=True):
                # AdamATan2's first update depends on the sign of a gradient, also near zero. Only a
                # few entries are near zero.
                if label.startswith("weight"):
                    self.assertLess(((a - b).abs() > 1e-6).float().mean().item(), 0.01, label)
                else:
                    self.assertLessEqual(
                        (a.double() - b.double()).abs().max().item(),
                        1e-6 * max(1, a.double().abs().max().item()),
                        label,
                    )

    def test_adamw_is_torchs(self):
        run = self.run_of(
            "training.optimizer=adamw",
            "training.weight_decay=0.3",
            "training.beta1=0.8",
            "training.beta2=0.9",
            "training.lr_min_ratio=0.1",
            "training.lr_warmup_steps=2",
        )
        twin = copy.deepcopy(run.model)
        fresh = torch.optim.AdamW(twin.parameters(), 1e-2, betas=(0.8, 0.9), weight_decay=0.3)
        grads = []
        self.steps(
            run, 5, lambda run: grads.append([p.grad.clone() for p in run.model.parameters()])
        )
        for t, of_step in enumerate(grads, 1):
            fresh.param_groups[0]["lr"] = lr_at(t, 1e-2, 2, run.total_steps, 0.1)
            for p, grad in zip(twin.parameters(), of_step, strict=True):
                p.grad = grad
            fresh.step()
        for (name, ours), theirs in zip(
            run.model.named_parameters(), twin.parameters(), strict=True
        ):
            self.assertTrue(torch.allclose(ours, theirs, rtol=0, atol=1e-6), name)
        self.assertEqual(
            run.optimizer.state_dict()["state"][0].keys(), fresh.state_dict()["state"][0].keys()
        )

    def test_everything_is_updated_once_and_in_order(self):
        run = self.run_of("training.ema_rate=0.5")
        start = [p.clone() for p in run.model.parameters()]
        self.steps(run, 1)
        for p, first, average in zip(
            run.model.parameters(), start, run.ema.module.parameters(), strict=True
        ):
            self.assertFalse(torch.equal(p, first))
            self.assertTrue(
                torch.allclose(average, 0.5 * first + 0.5 * p, atol=1e-6)
            )  # after the optimizer, not before it
        self.assertTrue(
            (run.model.puzzle_emb.weights.abs() - 0.01).abs().max() < 1e-6
        )  # all eight rows seen: +-lr each
        self.assertEqual(run.totals[-1].item(), 0)
        without = self.steps(self.run_of("training.ema=false", "model.puzzle_emb_ndim=0"), 2)
        self.assertIsNone(without.ema)
        self.assertIsNone(without.puzzle_optimizer)

    def test_auto_is_the_dtype_of_the_checkpoint_and_of_the_device_without_one(self):
        device, config = Device("cpu"), load_config(self.path, ["model.forward_dtype=auto"])
        for dtype in ("float32", "bfloat16"):
            settled = settle_forward_dtype(config, device, {"model": {"forward_dtype": dtype}})
            self.assertEqual(settled.model.forward_dtype, dtype)
        settled = settle_forward_dtype(config, device)
        self.assertEqual(settled.model.forward_dtype, device.forward_dtype("auto"))

    def test_everything_is_taken_over_from_a_checkpoint(self):
        run = self.steps(self.run_of(), 3)
        torch.rand(1)  # so that the generator is not as at the start
        run.interval_steps, run.interval_seconds, run.train_seconds = 3, 0.25, 1.5
        file = io.BytesIO()
        torch.save(run.state_dict(), file)
        saved = load_checkpoint(file.getvalue())
        for name, start in (("totals", run.totals * 0), ("generator", self.generator_at_start())):
            self.assertFalse(torch.equal(saved[name], start), name)
        self.assertFalse(saved["carry"]["halted"].all())
        again = TrainState(run.config, run.device, self.dataset, saved)
        self.same_content(again.state_dict(), saved)
        self.assertEqual((again.interval_seconds, again.train_seconds), (0.25, 1.5))

    def generator_at_start(self):
        kept = torch.get_rng_state()
        self.run_of()
        start = torch.get_rng_state()
        torch.set_rng_state(kept)
        return start

    def test_workers_share_what_the_host_gives_to_a_step(self):
        def host_batch(rank, world_size):
            device = Device("cpu")
            device.workers.rank, device.workers.world_size = rank, world_size
            config = load_config(self.path, ["model.halt_exploration_prob=0.5"])
            run = TrainState(config, device, self.dataset)
            return run.host_batch(run.loader.batch(0))

        whole, shares = host_batch(0, 1), [host_batch(rank, 4) for rank in range(4)]
        self.assertTrue(0 < (whole["min_halt_steps"] > 0).sum() < 8)
        for name in ("inputs", "labels", "puzzle_identifiers", "min_halt_steps"):
            together = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(together, whole[name], name)
        for share in shares:
            np.testing.assert_array_equal(share["scalars"], whole["scalars"])

    def test_clipping(self):
        norms = []
        for limit in (0.0, 1e-3):
            self.steps(
                self.run_of(f"training.grad_clip_norm={limit}"),
                1,
                lambda run: norms.append(
                    torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item()
                ),
            )
        self.assertGreater(norms[0], 0.1)
        self.assertAlmostEqual(norms[1], 1e-3, delta=1e-5)

    def test_the_first_step_with_a_number_that_is_not_finite_is_kept(self):
        run = self.run_of()
        self.steps(run, 2)
        with torch.no_grad():
            run.model.lm_head.weight[0, 0] = math.nan
        batches = iter(run.loader)
        for _ in range(2):
            run.train_step(run.device.put(run.host_batch(next(batches))))
            run.step += 1
        batches.close()
        self.assertEqual(run.totals[-1].item(), 3)


if __name__ == "__main__":
    unittest.main()
