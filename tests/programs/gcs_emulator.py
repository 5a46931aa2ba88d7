"""An emulator of Cloud Storage with one empty bucket, argv[1]. It prints its port, and ends with
its input: with the tests' process, however that ends."""

import logging
import sys

from gcp_storage_emulator.server import create_server

logging.disable()
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=sys.argv[1])
server.start()
print(server._api._httpd.server_port, flush=True)
sys.stdin.read()
server.stop()
