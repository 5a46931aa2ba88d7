"""analysis/tpu_hlo.py: costs, FLOPs and precisions that are read from HLO text."""

import unittest

import tpu_hlo

from tpu_types import GENERATIONS

V4, V6E = GENERATIONS["v4"], GENERATIONS["v6e"]
NUMBERS = 1024 * 256  # of each array in REST


def read_cost(text, kernel_cycles=None, chip=V4):
    return tpu_hlo.read_cost(text, chip, kernel_cycles or {})


def first_kernel(text):
    found = tpu_hlo.executed(*tpu_hlo.parse(text))
    return next(instruction for _, _, instruction in found if '"body"' in instruction.rest)


class Costs(unittest.TestCase):
    def test_a_loop_counts_its_passes_and_a_fusion_its_own_estimate(self):
        cost = read_cost(LOOP)
        # 100 outside; 7 passes of 30, and of 5 in the condition. The fusions' estimates include
        # what is in their computations.
        self.assertEqual(cost.cycles, 100 + 7 * (30 + 5))
        self.assertEqual(dict(cost.counts), {"fusion": 1 + 7 + 7})
        self.assertEqual(cost.loops_of_unknown_length, 0)
        self.assertAlmostEqual(cost.seconds, cost.cycles / 1.05e9)
        self.assertAlmostEqual(read_cost(LOOP, chip=V6E).seconds, cost.cycles / 1.75e9)

    def test_a_loop_of_unknown_length_is_counted_as_such(self):
        note = ', backend_config={"known_trip_count":{"n":"7"}}'
        self.assertIn(note, LOOP)
        cost = read_cost(LOOP.replace(note, ""))
        self.assertEqual((cost.cycles, cost.loops_of_unknown_length), (100 + 35, 1))

    def test_a_loop_that_counts_up_to_a_constant(self):
        """As the TPU compiler writes torch_xla's scan.

        The counter of 64 bits is in two halves, the condition is in logic, and there is no number
        of passes.
        """
        start = "%zero = u32[]{:T(128)} constant(0)"
        self.assertEqual(read_cost(COUNTED).cycles, 6 * 40)
        later = COUNTED.replace(start, start.replace("0)", "2)"))
        self.assertEqual(read_cost(later).cycles, 4 * 40)
        for change in (
            (start, start.replace("constant(0)", "parameter(1)")),
            ("constant(6)", "parameter(1)"),
            ("direction=LT", "direction=GT"),
        ):
            cost = read_cost(COUNTED.replace(*change))
            self.assertEqual((cost.cycles, cost.loops_of_unknown_length), (40, 1), change)

    def test_called_computations_and_every_branch_count(self):
        self.assertEqual(read_cost(CALLS).cycles, 11 + 13 + 17 + 19)

    def test_a_custom_call_counts_as_its_bound(self):
        calls = read_cost(REST).custom_calls
        # The kernel states its cost: 2.75e9 FLOPs take 10 us at the peak, and its bytes take less.
        self.assertEqual(
            calls["tpu_custom_call"],
            {
                "count": 1,
                "bytes": 3 * 4 * NUMBERS,
                "flops": 2_750_000_000,
                "bound_seconds": 1e-5,
                "seconds": 1e-5,
            },
        )
        # The other one has only its bytes.
        other = calls["Other"]
        self.assertEqual((other["bytes"], other["flops"]), (2 * 4 * NUMBERS, 0))
        self.assertAlmostEqual(other["seconds"], 2 * 4 * NUMBERS / 1.2e12)
        self.assertNotIn("ConcatBitcast", calls)
        on_v6e = read_cost(REST, chip=V6E).custom_calls
        self.assertAlmostEqual(on_v6e["tpu_custom_call"]["seconds"], 2_750_000_000 / 918e12)
        self.assertAlmostEqual(on_v6e["Other"]["seconds"], 2 * 4 * NUMBERS / 1638e9)

    def test_nothing_without_an_estimate_counts_as_zero(self):
        cost = read_cost(REST)
        self.assertEqual(cost.cycles, 0)
        self.assertEqual(cost.unestimated["count"], 1)  # the concatenation
        self.assertEqual(cost.unestimated["bytes"], 4 * 4 * NUMBERS)
        self.assertEqual(cost.collectives["all-reduce"], {"count": 1, "bytes": 4 * NUMBERS})
        self.assertEqual(cost.prefetch_bytes, 4 * NUMBERS + 4 * 128 * 256)
        calls = sum(call["seconds"] for call in cost.custom_calls.values())
        self.assertAlmostEqual(cost.seconds, calls + cost.unestimated["seconds"])

    def test_an_all_reduce_takes_its_bytes_over_the_links(self):
        self.assertAlmostEqual(tpu_hlo.all_reduce_seconds(300e9, 4, V4), 1.5)
        self.assertAlmostEqual(tpu_hlo.all_reduce_seconds(400e9, 4, V6E), 1.5)

    def test_a_kernel_takes_its_schedule_and_its_bytes_one_after_the_other(self):
        key = tpu_hlo.kernel_key(first_kernel(REST))
        moving = 3 * 4 * NUMBERS / 1.2e12
        # 21,000 cycles are 20 us; and the time is never less than the bound
        for cycles, seconds in ((21_000, 20e-6 + moving), (1, 10e-6)):
            call = read_cost(REST, {key: cycles}).custom_calls["tpu_custom_call"]
            self.assertAlmostEqual(call["seconds"], seconds)
            self.assertEqual(call["bound_seconds"], 1e-5)
        other = first_kernel(REST.replace('"body":"x"', '"body":"y"'))
        self.assertNotEqual(tpu_hlo.kernel_key(other), key)

    def test_cycles_by_line_of_code(self):
        self.assertEqual(
            tpu_hlo.cycles_by_source(read_cost(LOOP), "/kit"),
            [
                (210, 7, "trm_model.py:62", "aten__mm", "f32[8]"),
                (100, 1, "", "aten__mul", "f32[8]"),
                (35, 7, "", "fusion", "pred[]"),
            ],
        )


class Reading(unittest.TestCase):
    def test_flops_of_products_in_a_traced_program(self):
        """A loop in a called computation that is told where to start; and what a kernel states."""
        self.assertEqual(tpu_hlo.product_flops(TRACED), 5 * 2 * 4 * 16 * 8 + 1000)

    def test_precision_of_products(self):
        """ "highest" counts only with an operand in float32.

        Products are inside fusions, and in a loop as often as it runs.
        """
        expected = {"bfloat16": 1 + 1, "float32": 3 + 1}
        self.assertEqual(tpu_hlo.product_precisions(PRODUCTS), expected)

    def test_bytes_of_shapes(self):
        for shape, size in (
            ("f32[3,4]{1,0:T(8,128)S(3)}", 48),
            ("(bf16[5], pred[7], u32[])", 10 + 7 + 4),
            ("s4[3]", 2),
            ("f8e4m3fn[9]", 9),
            ("token[]", 0),
        ):
            self.assertEqual(tpu_hlo.array_bytes(shape), size, shape)

    def test_other_text_is_refused(self):
        with self.assertRaises(ValueError):
            read_cost("no HLO")


LOOP = """\
HloModule m, is_scheduled=true

%fused (a.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  ROOT %m.1 = f32[8]{0:T(128)} multiply(%a.1, %a.1), backend_config={"window_config":{\
"estimated_cycles":"999"}}
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %fusion.2 = f32[8]{0:T(128)S(3)} fusion(%x), kind=kLoop, calls=%fused, metadata={\
op_name="aten__mm.3/aten__mm" source_file="/kit/trm_model.py" source_line=62 source_end_line=62}, \
backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %fusion.2)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %fusion.3 = pred[] fusion(%c), kind=kLoop, calls=%fused, backend_config={"window_config":{\
"estimated_cycles":"5"}}
}

ENTRY %main.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p.1), kind=kLoop, calls=%fused, metadata={op_name="aten__mul" \
source_file="/elsewhere/torch/functional.py" source_line=9 source_end_line=9}, backend_config={\
"window_config":{"estimated_cycles":"100"}}
  %z = s32[] constant(0)
  %t.1 = (s32[], f32[8]{0}) tuple(%z, %fusion.1)
  %while.1 = (s32[]{:T(128)}, f32[8]{0}) while(%t.1), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""

COUNTED = """\
HloModule m
%body (b: (u32[], u32[], f32[8])) -> (u32[], u32[], f32[8]) {
  %b = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) parameter(0)
  ROOT %t = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) fusion(%b), kind=kLoop, calls=%x, \
backend_config={"window_config":{"estimated_cycles":"40"}}
}
%condition (c: (u32[], u32[], f32[8])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(0)
  %c.2 = u32[]{:T(128)} constant(0)
  %c.3 = u32[]{:T(128)} constant(6)
  %c = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}, /*index=3*/f32[]) parameter(0)
  %high = u32[]{:T(128)} get-tuple-element(%c), index=1
  %sign = s32[]{:T(128)S(6)} bitcast-convert(%high)
  %negative = pred[]{:T(512)S(6)} compare(%sign, %c.1), direction=LT
  %equal = pred[]{:T(512)S(6)} compare(%high, %c.2), direction=EQ
  %low = u32[]{:T(128)} get-tuple-element(%c), index=0
  %less = pred[]{:T(512)S(6)} compare(%low, %c.3), direction=LT
  %both = pred[]{:T(512)S(6)} and(%equal, %less)
  ROOT %or = pred[]{:T(512)} or(%negative, %both)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %copy.1 = u32[]{:T(128)} copy(%zero)
  %t = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) tuple(%copy.1, %zero, %p)
  %w = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=2
}
"""

TRACED = """\
HloModule m
%Body (b: (s64[], bf16[4,8])) -> (s64[], bf16[4,8]) {
  %b = (s64[], bf16[4,8]{1,0}) parameter(0)
  %i = s64[] get-tuple-element((s64[], bf16[4,8]{1,0}) %b), index=0
  %x = bf16[4,8]{1,0} get-tuple-element((s64[], bf16[4,8]{1,0}) %b), index=1
  %w = bf16[16,8]{1,0} constant({...})
  %d = bf16[4,16]{1,0} dot(bf16[4,8]{1,0} %x, bf16[16,8]{1,0} %w), lhs_contracting_dims={1}, \
rhs_contracting_dims={1}
  ROOT %t = (s64[], bf16[4,8]{1,0}) tuple(s64[] %i, bf16[4,8]{1,0} %x)
}
%Condition (c: (s64[], bf16[4,8])) -> pred[] {
  %c = (s64[], bf16[4,8]{1,0}) parameter(0)
  %i.1 = s64[] get-tuple-element((s64[], bf16[4,8]{1,0}) %c), index=0
  %five = s64[] constant(5)
  ROOT %l = pred[] compare(s64[] %i.1, s64[] %five), direction=LT
}
%scan (i: s64[], x: bf16[4,8]) -> (s64[], bf16[4,8]) {
  %i.2 = s64[] parameter(0)
  %x.2 = bf16[4,8]{1,0} parameter(1)
  %t.2 = (s64[], bf16[4,8]{1,0}) tuple(s64[] %i.2, bf16[4,8]{1,0} %x.2)
  ROOT %loop = (s64[], bf16[4,8]{1,0}) while((s64[], bf16[4,8]{1,0}) %t.2), condition=%Condition, \
body=%Body
}
ENTRY %main (p: bf16[4,8]) -> (s64[], bf16[4,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %k = bf16[4,8]{1,0} custom-call(bf16[4,8]{1,0} %p), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config": {"cost_estimate": {"flops": "1000", "bytes_accessed": "64"}}}
  %z = s64[] constant(0)
  ROOT %call = (s64[], bf16[4,8]{1,0}) call(s64[] %z, bf16[4,8]{1,0} %k), to_apply=%scan
}
"""

PRODUCTS = """\
HloModule m
%inner (a: f32[8,8], b: bf16[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %sum = f32[8,8]{1,0} add(%a, %a)
  ROOT %c.1 = f32[8,8]{1,0} convolution(%sum, %b), dim_labels=bf_io->bf, operand_precision={\
highest,highest}
}
%outer (a: f32[8,8], b: bf16[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %f.1 = f32[8,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%inner
}
%body (t: (s32[], f32[8,8], bf16[8,8])) -> (s32[], f32[8,8], bf16[8,8]) {
  %t = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %y = bf16[8,8]{1,0} get-tuple-element(%t), index=2
  %f.2 = f32[8,8]{1,0} fusion(%x, %y), kind=kOutput, calls=%outer
  ROOT %n = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%i, %f.2, %y)
}
%condition (t: (s32[], f32[8,8], bf16[8,8])) -> pred[] {
  %t = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  ROOT %p = pred[] fusion(%t), kind=kLoop, calls=%elsewhere
}
ENTRY %main (p: f32[8,8], q: bf16[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = bf16[8,8]{1,0} parameter(1)
  %d.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
operand_precision={highest,highest}
  %d.2 = f32[8,8]{1,0} dot(%d.1, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d.3 = bf16[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
operand_precision={highest,highest}
  %z = s32[] constant(0)
  %t = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%z, %d.2, %d.3)
  %w = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""

CALLS = """\
HloModule m
%one (a: f32[8]) -> f32[8] {
  ROOT %f.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{\
"estimated_cycles":"11"}}
}
%two (a: f32[8]) -> f32[8] {
  ROOT %f.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{\
"estimated_cycles":"13"}}
}
%three (a: f32[8]) -> f32[8] {
  ROOT %f.3 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{\
"estimated_cycles":"17"}}
}
%four (a: f32[8]) -> f32[8] {
  ROOT %f.4 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{\
"estimated_cycles":"19"}}
}
ENTRY %main (p: f32[8], s: s32[]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = s32[] parameter(1)
  %c = f32[8]{0} conditional(%s, %p, %p), branch_computations={%one, %two}
  %d = f32[8]{0} call(%c), to_apply=%three
  %e = ((f32[8]), f32[8], u32[]) async-start(%d), calls=%four
  ROOT %g = f32[8]{0} async-done(%e)
}
"""

REST = """\
HloModule m
ENTRY %main (p: f32[1024,256], q: f32[1024,256]) -> f32[1024,256] {
  %p = f32[1024,256]{1,0:T(8,128)} parameter(0)
  %q = f32[1024,256]{1,0:T(8,128)} parameter(1)
  %k = f32[1024,256]{1,0:T(8,128)} custom-call(%p, %q), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":2750000000,\
"transcendentals":0,"bytes_accessed":3145728}}}
  %o = f32[1024,256]{1,0:T(8,128)} custom-call(%k), custom_call_target="Other", backend_config={}
  %b = f32[2048,256]{1,0:T(8,128)} custom-call(%k, %o), custom_call_target="ConcatBitcast"
  %c = f32[2048,256]{1,0:T(8,128)} concatenate(%k, %o), dimensions={0}
  %cs = (f32[1024,256]{1,0:T(8,128)S(3)}, f32[1024,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %cd = f32[1024,256]{1,0:T(8,128)S(3)} copy-done(%cs)
  %ss = ((f32[1024,256]{1,0:T(8,128)}), f32[128,256]{1,0:T(8,128)S(3)}, s32[]{:S(2)}) \
slice-start(%p), slice={[0:128], [0:256]}
  %sd = f32[128,256]{1,0:T(8,128)S(3)} slice-done(%ss)
  ROOT %r = f32[1024,256]{1,0:T(8,128)} all-reduce(%o), replica_groups={}, to_apply=%add
}
"""


if __name__ == "__main__":
    unittest.main()
