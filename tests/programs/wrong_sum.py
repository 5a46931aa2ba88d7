"""scripts/check_devices.py on a host that adds up wrongly."""

import sys

sys.path[:0] = [".", "scripts"]
import check_devices

import collectives
import utils

right = collectives.Workers.all_reduce
collectives.Workers.all_reduce = lambda self, sent: [total - 1 for total in right(self, sent)]
utils.run_cli(check_devices.main)
