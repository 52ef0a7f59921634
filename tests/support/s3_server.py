"""An S3 server: Moto's, as a process of its own that can be made to fail for a while.

By hand: `python tests/support/s3_server.py PORT SWITCH_FILE`. Port 0 takes a free one, the port is printed, and the
server ends with its standard input. While the switch file exists, every request is answered with the status and error
code in it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSelector, S3FileSystem

BUCKET = "bucket"
SLOW_DOWN, ACCESS_DENIED = "503 SlowDown", "403 AccessDenied"
"""What storages say when they are overloaded, and when they will never do what is asked."""


@dataclass(frozen=True)
class S3Server:
    """A server on loopback with one bucket in it, which lasts as long as the server."""

    port: int
    switch: Path
    environment: dict[str, str]  # what clients must have in their environment beside os.environ

    def uri(self, name: str, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{name}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def filesystem(self, **options: Any) -> S3FileSystem:
        """The bucket past raymask, for assertions: paths begin with its name."""
        return S3FileSystem(
            **options,
            access_key=self.environment["AWS_ACCESS_KEY_ID"],
            secret_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def names(self, under: str) -> list[str]:
        """Objects below a name, by their names from there on."""
        prefix = f"{BUCKET}/{under}/"
        found = self.filesystem().get_file_info(FileSelector(prefix, allow_not_found=True, recursive=True))
        return sorted(info.path.removeprefix(prefix) for info in found if info.is_file)

    def read(self, name: str) -> bytes:
        with self.filesystem().open_input_stream(f"{BUCKET}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        with self.filesystem().open_output_stream(f"{BUCKET}/{name}") as stream:
            stream.write(data)

    def impatient(self) -> S3FileSystem:
        """The bucket through a client that never tries again by itself, which takes seconds a time."""
        return self.filesystem(retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1))

    @contextmanager
    def outage(self, answer: str = SLOW_DOWN) -> Iterator[None]:
        """All requests are answered so, whoever asks."""
        beside = self.switch.with_suffix(".part")
        beside.write_text(answer)
        beside.replace(self.switch)  # the server must never read half of it
        try:
            yield
        finally:
            self.switch.unlink()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server of one's own, and its credentials in this process's environment.

    It ends with the block, and with this process, come what may.
    """
    with TemporaryDirectory(prefix="raymask-s3-") as folder, mock.patch.dict(os.environ, client_environment()):
        switch = Path(folder) / "outage"
        command = [sys.executable, __file__, "0", str(switch)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            found = S3Server(port, switch, client_environment())
            found.filesystem().create_dir(BUCKET)
            yield found
        finally:
            server.kill()
            server.communicate()


def client_environment() -> dict[str, str]:
    """Credentials as real ones are given; nothing is asked of a machine's role, nor read from the user's files."""
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


# --- the server's own process ----------------------------------------------------------------------------------------


def switched(app: Callable[..., Iterable[bytes]], switch: Path) -> Callable[..., Iterable[bytes]]:
    """The same application, which answers with an error while the switch is there."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            status, code = switch.read_text().split()
        except FileNotFoundError:
            return app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # unread, it would reset the connection
        start_response(f"{status} {code}", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>the switch is on</Message></Error>".encode()]

    return answer


def end_with_parent() -> None:
    """A pipe that we only wait on closes when the other side is gone, however it went."""
    sys.stdin.read()
    os._exit(0)


def serve(port: int, switch: Path) -> None:
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = switched(DomainDispatcherApplication(create_backend_app), switch)
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=MotoRequestHandler)
    print(server.port, flush=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
