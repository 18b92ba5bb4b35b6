"""The meeting of a run's processes, over plain sockets, before JAX starts.

If a process never comes, JAX ends the others with a C++ stack trace that does not say which one is missing. Here, each
process connects to process 0 and sends "ttt-e2e NUMBER COUNT". Process 0 answers "go" when all are there, or an error.
"""

import re
import socket
import time

from ttt_e2e.errors import UserError


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes have called it.

    Args:
      coordinator: HOST:PORT, at which process 0 listens.
      num_processes: how many there are in all.
      process_id: which one this is, from 0.
      timeout: seconds to wait for all of them.

    Raises:
      UserError: some processes have not come, or they disagree on the count. All that have come raise it, with the same
        message, which names processes by their number.
    """
    if process_id == 0:
        _host(int(coordinator.rpartition(":")[2]), num_processes, timeout)
    else:
        _join(coordinator, f"ttt-e2e {process_id} {num_processes}\n", timeout)


def _host(port: int, num_processes: int, timeout: float) -> None:
    """Process 0's part: waits for the other processes, and answers all that came."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        listener = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
        )
    except OSError as error:
        raise UserError(f"process 0 cannot listen at port {port} ({error.strerror}): choose another one") from None
    callers: list[socket.socket] = []
    answer = "go"
    try:
        with listener:
            _wait_for_callers(listener, callers, num_processes, timeout)
    except UserError as error:
        answer = str(error)
        raise
    finally:
        for caller in callers:
            with caller:
                _send_line(caller, answer)


def _wait_for_callers(listener: socket.socket, callers: list[socket.socket], num_processes: int, timeout: float):
    """Accepts connections until all processes have come, and appends their sockets to `callers`.

    Raises:
      UserError: some have not come within `timeout` seconds, or one's number or count does not fit.
    """
    deadline = time.monotonic() + timeout
    missing = set(range(1, num_processes))
    while missing and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            caller, _ = listener.accept()
        except TimeoutError:
            break
        caller.settimeout(min(left, 10))
        introduction = re.fullmatch(r"ttt-e2e ([0-9]{1,9}) ([0-9]{1,9})\n", _receive_line(caller))
        if not introduction:  # another program, or gone again
            caller.close()
            continue
        callers.append(caller)
        number, count = int(introduction[1]), int(introduction[2])
        if count != num_processes:
            raise UserError(f"process {number} was told of {count} processes, process 0 of {num_processes}")
        if number >= num_processes:
            raise UserError(f"process {number} of {num_processes}: numbers are 0 to {num_processes - 1}")
        if number not in missing:
            raise UserError(f"two processes have the number {number}: each needs its own")
        missing.remove(number)
    if missing:
        numbers = ", ".join(map(str, sorted(missing)))
        raise UserError(f"process {numbers} of {num_processes} did not come within {timeout} seconds")


def _join(coordinator: str, introduction: str, timeout: float) -> None:
    """The other processes' part: introduces this one to process 0, again and again until that answers."""
    host, _, port = coordinator.rpartition(":")
    address, deadline, reason = (host.strip("[]"), int(port)), time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 10)) as connection:
                connection.sendall(introduction.encode())
                connection.settimeout(left + 5)  # process 0 is given time to say who is missing
                answer, reason = _receive_line(connection).strip(), "it hung up"
        except (OSError, UnicodeError) as error:  # UnicodeError: no host has such a name
            answer, reason = "", getattr(error, "strerror", None) or str(error)
        if answer == "go":
            return
        if answer:
            raise UserError(answer)
        time.sleep(0.1)
    raise UserError(f"process 0 at {coordinator} did not answer within {timeout} seconds ({reason})")


def _receive_line(connection: socket.socket) -> str:
    """The line that the other end sends; "" if it hung up."""
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < 1000 and (more := connection.recv(100)):
            received += more
    except OSError:
        return ""
    return received.decode(errors="replace")


def _send_line(connection: socket.socket, line: str) -> None:
    """Sends a line, and ignores that the other end may have hung up."""
    try:
        connection.sendall(f"{line}\n".encode())
        connection.settimeout(1)
        connection.recv(1)  # lets the caller hang up first: the port is free at once, for JAX
    except OSError:
        return
