"""moto's S3 server on loopback, with injected faults; started by test_remote.py.

    faulty_s3.py [FAULT …]

Prints its port. The first GET requests for objects that end in .tar get the faults, in order. moto answers
all other requests.
"""

import sys
import time

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app


class FaultyS3:
    """moto's WSGI application behind a filter that injects the faults."""

    def __init__(self, faults):
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.faults = faults

    def __call__(self, environ, start_response):
        is_shard = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar")
        if not is_shard or not self.faults:
            return self.moto(environ, start_response)
        fault = self.faults.pop(0)
        if fault == "unavailable":
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>Later</Message></Error>"]
        body, status, headers = run_wsgi_app(self.moto, environ, buffered=True)
        content = b"".join(body)
        if fault == "truncated":
            headers["Content-Length"] = str(len(content) // 2)
        start_response(status, list(headers))
        return self.fail(fault, content)

    def fail(self, fault, content):
        yield content[: len(content) // 2]
        if fault == "silent":
            time.sleep(3)


def main():
    server = make_server("127.0.0.1", 0, FaultyS3(sys.argv[1:]), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
