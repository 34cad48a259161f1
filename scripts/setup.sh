#!/usr/bin/env bash
# Makes the Python environment of one stack and leaves it alone once it is complete.
#
#   bash scripts/setup.sh        .venv: LLaVA (llava-torch) on transformers 4.37.2
#   bash scripts/setup.sh hf     .venv-hf: Hugging Face's own LLaVA classes on transformers 5
#   bash scripts/setup.sh lmms   .venv-lmms: the same with lmms-eval
set -euo pipefail
cd "$(dirname "$0")/.."

STACK=${1:-llava}
PYTHON=${PYTHON:-python3}
case "$STACK" in
    llava) VENV=.venv ;;
    hf) VENV=.venv-hf ;;
    lmms) VENV=.venv-lmms ;;
    *) echo "setup.sh: no stack '$STACK'; use llava, hf or lmms" >&2; exit 2 ;;
esac
REQUIREMENTS=scripts/requirements-$STACK.txt
STAMP=$VENV/.complete

if cmp -s "$REQUIREMENTS" "$STAMP"; then
    exit 0
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "setup.sh: Python 3.10 or newer is needed, $PYTHON is $("$PYTHON" --version)" >&2; exit 2; }
echo "setup.sh: installing $REQUIREMENTS into $VENV (about a minute, once)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
# torch first, by itself: others only ask for "torch", and its build must be the pinned one
"$VENV/bin/pip" install -q --disable-pip-version-check "$(grep '^torch==' "$REQUIREMENTS")"
# DeepSpeed compiles its one CPU operator on first use, none at install time
DS_BUILD_OPS=0 "$VENV/bin/pip" install -q --disable-pip-version-check -r "$REQUIREMENTS"
if [ "$STACK" = llava ]; then
    # without its dependencies, which are pinned to releases of 2023
    "$VENV/bin/pip" install -q --disable-pip-version-check --no-deps llava-torch==1.2.2.post1
fi
if [ "$STACK" = lmms ]; then
    # without dependencies too; the project is installed as well, for lmms-eval to find by its entry point
    "$VENV/bin/pip" install -q --disable-pip-version-check --no-deps lmms-eval==0.7.3
    "$VENV/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
cp "$REQUIREMENTS" "$STAMP"
