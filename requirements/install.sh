#!/usr/bin/env bash
# Build the environment of one stack and link this checkout to it.
#
#   requirements/install.sh [openmmlab|onedl] [yolo|hosts|notebooks]
#
# The packages (5 GB, and mmcv takes minutes to compile) live in a cache
# folder, once a machine, named by a hash of everything that decides their
# content: $MMDBB_CACHE, or ~/.cache/mmdbb. `.venv-STACK` in the checkout is
# a thin environment over it that holds mmdbb itself, in editable form.
# Whatever an interrupted call left behind, the next call completes.
#
# With a second argument the environment also has the packages of
# requirements/yolo.txt, hosts.txt or notebooks.txt, and is
# `.venv-STACK-yolo` and so on. The first one stays without them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=${1:-openmmlab}
if [ ! -f "requirements/mmcv-$stack.txt" ]; then
  echo "unknown STACK '$stack'; allowed: openmmlab, onedl" >&2
  exit 2
fi
more=${2:-}
if [ -n "$more" ] && [ "$more" != yolo ] && [ "$more" != hosts ] &&
  [ "$more" != notebooks ]; then
  echo "unknown packages '$more'; allowed: yolo, hosts, notebooks" >&2
  exit 2
fi
python=${PYTHON:-python3.11}
if ! command -v "$python" >/dev/null; then
  echo "'$python' not found; the pinned packages need Python 3.11" \
    "(name another one with PYTHON=...)" >&2
  exit 2
fi
abi=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
hash_of() { cat "$@" | sha256sum | cut -c1-12; }

common=(requirements/{base,demo,tests,constraints}.txt)
mmcv=requirements/mmcv-$stack.txt
cache=${MMDBB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmdbb}
key=$(hash_of "${common[@]}" "$mmcv" "requirements/$stack.txt")
root=$cache/$stack-$abi-$key
wheels=$cache/wheels-$stack-$abi-$(hash_of requirements/base.txt "$mmcv")
env=$root/env
mkdir -p "$root" "$wheels"

# One installer at a time; others wait.
exec 9>"$cache/$stack.lock"
flock 9

pip() { "$env/bin/python" -m pip --disable-pip-version-check "$@" -q; }

# pip is not atomic: an environment in which it was interrupted starts anew.
install() {
  touch "$root/installing"
  pip install -c requirements/constraints.txt "$@"
  rm "$root/installing"
}

if [ ! -e "$root/complete" ]; then
  echo "building the $stack environment in $root" >&2
  if [ -e "$root/installing" ] || [ ! -x "$env/bin/python" ]; then
    rm -rf "$env" "$root/installing"
    "$python" -m venv "$env"
  fi
  # torch comes first: mmcv compiles its operators against it.
  install -r requirements/base.txt
  if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    echo "compiling mmcv: five to ten minutes on two cores" >&2
    rm -rf "$wheels/building"
    # pip's own cache would hand over a wheel built for another torch.
    MAX_JOBS=${MAX_JOBS:-$(nproc)} MMCV_WITH_OPS=1 \
      PATH="$env/bin:$PATH" pip wheel --no-deps --no-cache-dir \
      --no-build-isolation -w "$wheels/building" -r "$mmcv"
    mv "$wheels"/building/*.whl "$wheels"
    rm -rf "$wheels/building"
  fi
  install --no-build-isolation "$wheels"/*.whl \
    -r "requirements/$stack.txt" -r requirements/base.txt \
    -r requirements/demo.txt -r requirements/tests.txt
  "$env/bin/python" -c 'import mmcv.ops, mmdet, mmpretrain, mmseg'
  touch "$root/complete"
fi

# Packages on top, without what they ask for: that is pinned already.
folders=("$("$env/bin/python" -c \
  'import sysconfig; print(sysconfig.get_path("purelib"))')")
venv=.venv-$stack
if [ -n "$more" ]; then
  venv=$venv-$more
  added=$cache/$more-$abi-$(hash_of "requirements/$more.txt")
  if [ ! -d "$added" ]; then
    rm -rf "$added.part"
    pip install --no-deps --only-binary :all: --target "$added.part" \
      -r "requirements/$more.txt"
    mv "$added.part" "$added"
  fi
  folders+=("$added")
fi

# The checkout's own environment: the packages above, plus this mmdbb.
if [ "$(cat "$venv/packages" 2>/dev/null)" != "${folders[*]}" ] ||
  ! ls -d "$venv"/lib/python*/site-packages/mmdbb-*.dist-info >/dev/null 2>&1
then
  rm -rf "$venv"
  "$env/bin/python" -m venv --without-pip "$venv"
  site=$("$venv/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')
  for folder in "${folders[@]}"; do
    echo "import site; site.addsitedir('$folder')"
  done >"$site/packages.pth"
  "$venv/bin/python" -m pip --disable-pip-version-check install -q \
    --no-deps --no-build-isolation -e .
  echo "${folders[*]}" >"$venv/packages"
fi
echo "$venv"
