#!/usr/bin/env bash
# Build the environment of one stack and link this checkout to it.
#
#   requirements/install.sh [openmmlab|onedl|light|torch] [PACKAGES]
#
# The packages (5 GB, most of it torch) live in a cache folder, once a
# machine, named by a hash of everything that decides their content:
# $MMDBB_CACHE, or ~/.cache/mmdbb. `.venv-STACK` in the checkout is a thin
# environment over it that holds mmdbb itself, in editable form. Whatever an
# interrupted call left behind, the next call completes.
#
#   openmmlab, onedl   all packages; mmcv is compiled, which takes minutes
#   light              mmengine, mmcv-lite, mmpretrain: nothing is compiled
#   torch              no package of OpenMMLab
#
# Where a larger environment is complete, `light` and `torch` take that one.
#
# With PACKAGES, any requirements/PACKAGES.txt that is on top of a stack (yolo,
# hosts, docs, types, release, ...), the environment also has those, and is
# `.venv-STACK-PACKAGES`. The first one stays without them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=${1:-openmmlab}
case $stack in
  openmmlab | onedl | light | torch) ;;
  *)
    echo "unknown STACK '$stack'; allowed: openmmlab, onedl, light, torch" >&2
    exit 2
    ;;
esac
more=${2:-}
on_top=()
for file in requirements/*.txt; do
  name=$(basename "$file" .txt)
  case $name in
    # What the stacks themselves are made of.
    base | constraints | demo | tests | light | torch | openmmlab | onedl | \
      mmcv-*) ;;
    *) on_top+=("$name") ;;
  esac
done
if [ -n "$more" ] && [[ " ${on_top[*]} " != *" $more "* ]]; then
  echo "unknown packages '$more'; allowed: ${on_top[*]}" >&2
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
cache=${MMDBB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mmdbb}

# The folder of a stack's packages.
root_of() {
  local files
  case $1 in
    light | torch) files=(requirements/{base,demo,constraints}.txt) ;;
    *)
      files=(requirements/{base,demo,tests,constraints}.txt
        "requirements/mmcv-$1.txt")
      ;;
  esac
  echo "$cache/$1-$abi-$(hash_of "${files[@]}" "requirements/$1.txt")"
}

root=$(root_of "$stack")
if [ ! -e "$root/complete" ]; then
  larger=()
  if [ "$stack" = torch ]; then larger=(light openmmlab); fi
  if [ "$stack" = light ]; then larger=(openmmlab); fi
  for other in ${larger[@]+"${larger[@]}"}; do
    if [ -e "$(root_of "$other")/complete" ]; then
      stack=$other
      root=$(root_of "$stack")
      break
    fi
  done
fi
env=$root/env
mkdir -p "$root"

# One installer at a time; others wait.
exec 9>"$cache/$stack.lock"
if ! flock -n 9; then
  echo "another call is building the $stack environment; waiting for it" >&2
  flock 9
fi

# Run a command of pip's and show how far it is: shown TITLE ARGUMENTS...
shown() {
  local title=$1 site
  shift
  site=$("$env/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')
  rm -rf "$root/tmp"
  mkdir "$root/tmp"
  TMPDIR=$root/tmp "$python" requirements/progress.py "$title" \
    --tmp "$root/tmp" --site "$site" --log "$root/install.log" -- \
    "$env/bin/python" -m pip --disable-pip-version-check "$@"
  rm -rf "$root/tmp"
}

# pip is not atomic: an environment in which it was interrupted starts anew.
install() {
  touch "$root/installing"
  shown "$1" install -c requirements/constraints.txt "${@:2}"
  rm "$root/installing"
}

# torch comes first: mmcv compiles its operators against it.
build_torch() {
  if [ -e "$root/installing" ] || [ ! -x "$env/bin/python" ]; then
    rm -rf "$env" "$root/installing"
    "$python" -m venv "$env"
  fi
  install "[1/$1] torch" -r requirements/base.txt
}

build_light() {
  build_torch 2
  install "[2/2] $stack, demo" --no-build-isolation \
    -r "requirements/$stack.txt" -r requirements/base.txt \
    -r requirements/demo.txt
  if [ "$stack" = light ]; then
    "$env/bin/python" -W ignore -c 'import mmpretrain.models' >&2
  fi
}

build_full() {
  local mmcv=requirements/mmcv-$stack.txt
  local wheels
  wheels=$cache/wheels-$stack-$abi-$(hash_of requirements/base.txt "$mmcv")
  mkdir -p "$wheels"
  build_torch 3
  if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    rm -rf "$wheels/building"
    # pip's own cache would hand over a wheel built for another torch. With
    # -v it passes on what ninja says: how many files are compiled.
    MAX_JOBS=${MAX_JOBS:-$(nproc)} MMCV_WITH_OPS=1 PATH="$env/bin:$PATH" \
      shown '[2/3] mmcv' wheel -v --no-deps --no-cache-dir \
      --no-build-isolation -w "$wheels/building" -r "$mmcv"
    mv "$wheels"/building/*.whl "$wheels"
    rm -rf "$wheels/building"
  fi
  install "[3/3] $stack, demo, tests" --no-build-isolation \
    "$wheels"/*.whl -r "requirements/$stack.txt" -r requirements/base.txt \
    -r requirements/demo.txt -r requirements/tests.txt
  "$env/bin/python" -W ignore -c 'import mmcv.ops, mmdet, mmpretrain, mmseg'
}

if [ ! -e "$root/complete" ]; then
  echo "building the $stack environment in $root, once for this machine" >&2
  case $stack in
    light | torch) build_light ;;
    *) build_full ;;
  esac
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
    shown "packages of requirements/$more.txt" \
      install -c requirements/constraints.txt --no-deps \
      --only-binary :all: --target "$added.part" -r "requirements/$more.txt"
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
    --no-deps --no-build-isolation -e . >&2
  echo "${folders[*]}" >"$venv/packages"
fi
echo "$venv"
