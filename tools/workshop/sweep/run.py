# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Run the sweep: each architecture in a process of its own, with limits."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch

from .architectures import Architecture, Read, distinct, read_config
from .networks import unformatted
from .packages import config_files, import_package
from .trial import Trial

#: Configs that one process reads.
_AT_ONCE = 100
#: A process that waits longer than this many times its limit hangs.
_PATIENCE = 20


class Limits(NamedTuple):
    """What a process may use.

    Attributes:
        jobs: Processes that run at once.
        seconds: Time on the processor for one architecture.
        gigabytes: Memory for one architecture.
    """

    jobs: int = 2
    seconds: float = 60.0
    gigabytes: float = 8.0


class Results:
    """The rows of a sweep, in a file that grows by a line for each.

    A run that was cut goes on from there.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: Dict[str, dict] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # cut
                    row = json.loads(line)
                    self.rows[row['key']] = row
            path.write_text(''.join(map(_line, self.rows.values())))

    def add(self, row: dict) -> None:
        """Keep a row, in the file too."""
        self.rows[row['key']] = row
        with self.path.open('a') as file:
            file.write(_line(row))


#: An absolute path with its folders, of which rows keep none.
_FOLDERS = re.compile(r'(?<![\w./])/(?:[\w.+-]+/)+')


def _line(row: dict) -> str:
    return json.dumps(_without_folders(row)) + '\n'


def _without_folders(value: Any) -> Any:
    """Plain data for a file that is kept with the docs."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(each) for each in value]
    return _FOLDERS.sub('.../', value) if isinstance(value, str) else value


def find_architectures(
    package: str, limits: Limits
) -> Tuple[List[Architecture], Dict[str, Any]]:
    """The distinct architectures of a package.

    Args:
        package: Its import name.
        limits: How many processes read configs at once.

    Returns:
        The architectures; and notes: ``package``, ``version``, ``lifted``
        (see :class:`~workshop.sweep.packages.Imported`), ``files`` (the number
        of its configs), ``architectures`` (their number),
        ``unread`` (name of a config -> why it cannot be
        read).
    """
    imported = import_package(package)
    files = config_files(package)
    groups = [files[i : i + _AT_ONCE] for i in range(0, len(files), _AT_ONCE)]
    read: List[Read] = []
    tasks = {
        number: (_read_all, (group, package))
        for number, group in enumerate(groups)
    }
    for _, found in run_isolated(tasks, limits._replace(seconds=1200)):
        if isinstance(found, str):
            raise RuntimeError(f'reading the configs of {package}: {found}')
        read += [Read(*one) for one in found]
    architectures = distinct(package, read)
    notes = dict(
        package=package,
        architectures=len(architectures),
        version=imported.version,
        lifted=imported.lifted,
        files=len(files),
        unread={
            one.path.partition('/configs/')[2]: one.error[:400]
            for one in read
            if one.error
        },
    )
    return architectures, notes


def _read_all(paths: List[Path], package: str) -> List[Read]:
    return [read_config(path, package) for path in paths]


def sweep(
    architectures: List[Architecture],
    results: Results,
    limits: Limits,
    commit: str,
) -> Iterator[dict]:
    """Try architectures that have no row yet.

    Args:
        architectures: What to try.
        results: The rows; each new one is added when it is there.
        limits: What each may use.
        commit: The commit that is tried, for the rows.

    Yields:
        dict: Each new row, as described in
        :class:`~workshop.sweep.trial.Trial`. A process that ended otherwise
        leaves ``ended``, the reason.
    """
    left = {each.key: each for each in architectures}
    left = {k: v for k, v in left.items() if k not in results.rows}
    tasks = {key: (_try_out, (each,)) for key, each in left.items()}
    for key, row in run_isolated(tasks, limits):
        if isinstance(row, str):
            row = {**Trial(left[key]).row, 'ended': row}
        row = dict(row, commit=commit)
        results.add(row)
        yield row


def _try_out(architecture: Architecture) -> dict:
    row = Trial(architecture).run()
    return dict(row, seconds=round(time.process_time(), 1))


def run_isolated(
    tasks: Dict[Any, Tuple[Callable, tuple]], limits: Limits
) -> Iterator[Tuple[Any, Any]]:
    """Call functions, each in a process of its own.

    The processes are forks of this one, so that they need not import the
    packages again; whatever they change is gone with them.

    Args:
        tasks: Key -> function and arguments. Results must be plain data.
        limits: What each process may use.

    Yields:
        tuple: Key and result, in the order in which they are there; for a
        process that did not end by itself the reason, a string.
    """
    torch.set_num_threads(1)  # a fork has no threads but its own
    context = multiprocessing.get_context('fork')
    waiting = list(tasks.items())
    running: Dict[Any, tuple] = {}
    while waiting or running:
        while waiting and len(running) < limits.jobs:
            key, task = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(sender, task, limits), daemon=True
            )
            process.start()
            sender.close()
            running[key] = (process, receiver, time.time())
        receivers = [receiver for _, receiver, _ in running.values()]
        multiprocessing.connection.wait(receivers, timeout=0.5)
        for key, (process, receiver, start) in list(running.items()):
            if receiver.poll():
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    result = _ending(process.exitcode, limits)
            elif time.time() - start > _PATIENCE * limits.seconds:
                result = f'hangs after {_PATIENCE * limits.seconds:.0f} s'
            else:
                continue
            process.kill()
            process.join()
            receiver.close()
            del running[key]
            yield key, result


def _ending(code: int, limits: Limits) -> str:
    """Why a process ended that gave no result."""
    if -code in (signal.SIGKILL, signal.SIGXCPU):
        return f'took more than {limits.seconds:.0f} s, or too much memory'
    return f'ended with code {code}'


def _child(sender: Any, task: Tuple[Callable, tuple], limits: Limits) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter('ignore')
    with open(os.devnull, 'w') as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    most = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    seconds = int(used + limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    function, args = task
    try:
        with unformatted():
            result = function(*args)
        sender.send(result)
    except Exception as error:
        sender.send(f'{type(error).__name__}: {error}'[:400])
