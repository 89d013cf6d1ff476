#!/usr/bin/env python3
"""Run a command and say in one line what it does and how far it is.

    progress.py "[1/2] torch" --tmp DIR --site DIR --log FILE -- COMMAND ...

Understands pip (what it collects, how much of a file is here, how many
packages are in place) and ninja (files compiled). On a terminal the line
changes in place; elsewhere a new one appears every 15 seconds. All that the
command says goes into the log; if it fails, its last lines are shown.

Runs before anything is installed, so it needs Python alone.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

COLLECTING = re.compile(r'^\s*Collecting ([\w.\[\]-]+)')
DOWNLOADING = re.compile(r'^\s*Downloading (\S+) \(([\d.]+) ([kMG]?B)\)')
INSTALLING = re.compile(r'^Installing collected packages: (.+)$')
BUILDING = re.compile(
    r'^\s*Building wheels? for (?:collected packages: )?(\S+)'
)
PREPARING = re.compile(r'^\s*(Preparing metadata|Running command)')
COMPILING = re.compile(r'^\s*\[(\d+)/(\d+)\] ')
UNITS = {'B': 1, 'kB': 1e3, 'MB': 1e6, 'GB': 1e9}
#: Seconds between two lines where there is no terminal.
EVERY = 15.0


class State:
    """How far a command is, by the lines that it has printed.

    Args:
        tmp: The command's folder for temporary files, where pip keeps the
            file that it downloads.
        site: The folder that packages are installed into.
    """

    def __init__(self, tmp=None, site=None):
        self.tmp, self.site = tmp, site
        self.text = 'starting'
        self.file = self.size = None
        self.packages = ()
        self.compiled = None  # (files, of how many, when the first was)

    def read(self, line, now):
        """Take a line of the command's output."""
        found = COMPILING.match(line)
        if found:
            done, of = int(found[1]), int(found[2])
            begun = self.compiled[2] if self.compiled else now
            self.compiled = (done, of, begun)
        elif DOWNLOADING.match(line):
            address, size, unit = DOWNLOADING.match(line).groups()
            self.file = address.rpartition('/')[2].partition('#')[0]
            self.size = float(size) * UNITS[unit]
            self.text = f'downloading {"-".join(self.file.split("-")[:2])}'
        elif INSTALLING.match(line):
            self.packages = INSTALLING.match(line)[1].split(', ')
            self.file = None
            self.before = self._installed()
        elif COLLECTING.match(line):
            self.text = f'looking for {COLLECTING.match(line)[1]}'
            self.file = None
        elif BUILDING.match(line):
            self.text = f'building {BUILDING.match(line)[1].rstrip(",:")}'
            self.file = None
        elif PREPARING.match(line):
            self.text, self.file = 'preparing to build', None

    def line(self, now):
        """What to show now."""
        if self.packages:
            done = self._installed() - self.before
            of = len(self.packages)
            return f'unpacking packages: {min(done, of)} of {of}'
        if self.compiled:
            done, of, begun = self.compiled
            text = f'compiling: file {done} of {of}'
            if 5 < done < of:
                left = (now - begun) / (done - 1) * (of - done)
                text += f', about {clock(left)} left'
            return text
        if self.file:
            name = 'MB' if self.size >= 1e6 else 'kB'
            here, size = self._downloaded() / UNITS[name], self.size
            return (
                f'{self.text}: {here:.0f} of {size / UNITS[name]:.0f} {name}'
            )
        return self.text

    def _installed(self):
        site = Path(self.site) if self.site else None
        if not site or not site.is_dir():
            return 0
        return sum(1 for _ in site.glob('*.dist-info'))

    def _downloaded(self):
        sizes = [0]
        for path in Path(self.tmp).glob('*/*') if self.tmp else ():
            if path.name == self.file:
                try:
                    sizes.append(path.stat().st_size)
                except OSError:  # moved on in between
                    sizes.append(self.size)
        return max(sizes)


def clock(seconds):
    """Minutes and seconds.

    >>> clock(83.4)
    '1:23'
    """
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


class Shown(threading.Thread):
    """Shows the state of a command until it is stopped."""

    def __init__(self, title, state, out, every=EVERY):
        super().__init__(daemon=True)
        self.title, self.state, self.out, self.every = title, state, out, every
        self.terminal = out.isatty()
        self.ended = threading.Event()
        self.begun = time.monotonic()

    def run(self):
        while not self.ended.wait(0.5 if self.terminal else self.every):
            now = time.monotonic()
            text = f'{self.title}: {self.state.line(now)}'
            self.say(f'{text} ({clock(now - self.begun)})', last=False)

    def stop(self, how):
        self.ended.set()
        self.join()
        self.say(
            f'{self.title}: {how} ({clock(time.monotonic() - self.begun)})'
        )

    def say(self, text, last=True):
        if self.terminal:
            print(f'\r\033[K{text}', end='\n' if last else '', file=self.out)
        else:
            print(text, file=self.out)
        self.out.flush()


def run(command, title, state, log, out=sys.stderr):
    """Run a command, and return its exit code."""
    shown = Shown(title, state, out)
    shown.start()
    last = deque(maxlen=20)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
    )
    try:
        with open(log, 'a', errors='replace') as file:
            file.write(f'$ {" ".join(command)}\n')
            for line in process.stdout:
                file.write(line)
                last.append(line)
                state.read(line, time.monotonic())
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    shown.stop('failed' if code else 'done')
    if code:
        print(''.join(last), end='', file=out)
        print(f'all that it said is in {log}', file=out)
    return code


def main():
    """Run the command that stands behind --."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('title')
    parser.add_argument('--tmp', help='where pip keeps what it downloads')
    parser.add_argument('--site', help='where it installs to')
    parser.add_argument('--log', required=True)
    own, rest = sys.argv[1:], []
    if '--' in own:
        at = own.index('--')
        own, rest = own[:at], own[at + 1 :]
    args = parser.parse_args(own)
    if not rest:
        parser.error('give a command behind --')
    try:
        code = run(rest, args.title, State(args.tmp, args.site), args.log)
    except KeyboardInterrupt:
        print(f'\n{args.title}: interrupted', file=sys.stderr)
        code = 130
    raise SystemExit(code)


if __name__ == '__main__':
    main()
