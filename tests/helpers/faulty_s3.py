"""moto's S3 server on loopback, with injected faults. Prints its port.

A POST to `FAULTS_PATH` lists faults, separated by spaces. The next requests for objects that end in .tar get
one each; moto answers all others.
"""

import time

FAULTS_PATH = "/faults"


class FaultyS3:
    """moto's WSGI application behind a filter that injects the faults."""

    def __init__(self, moto):
        self.moto = moto
        self.faults = []

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == FAULTS_PATH:
            self.faults = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode().split()
            start_response("204 No Content", [])
            return []
        is_shard = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar")
        if not is_shard or not self.faults:
            return self.moto(environ, start_response)
        fault = self.faults.pop(0)
        if fault == "unavailable":
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>Later</Message></Error>"]
        from werkzeug.test import run_wsgi_app

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
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = FaultyS3(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
