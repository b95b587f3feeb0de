#!/usr/bin/env bash
# Installs Trifold on a Jetson with JetPack 6 or 7, or on another Linux with systemd. Run again, it brings
# what is there up to date; settings, keys and bundles stay as they are.
#
#   sudo deploy/jetson/install.sh [--wheel FILE] [--prefix FOLDER] [--only-program] WHAT…
#
# WHAT is one or more of authority, core, edge, device (a site's service), sdk (the client in Python alone).
#   --wheel         Trifold's wheel; without it, the one in dist/ (`make wheel`)
#   --prefix        where the program goes (/opt/trifold), with --only-program
#   --only-program  no service user, settings and units, as in an image
set -euo pipefail
shopt -s inherit_errexit
# The service user reads what root installs.
umask 022

prefix=/opt/trifold
state=/var/lib/trifold
settings=/etc/trifold/trifold.toml
units=/etc/systemd/system
release=/etc/nv_tegra_release
brought=3.12

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
locks=$here/../locks
wheel=
services=yes
what=()

say() { printf 'install.sh: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

lock_of() {
    case $1 in
        authority | core) echo "$locks/cloud.txt" ;;
        edge) echo "$locks/edge.txt" ;;
        device) echo "$locks/gateway.txt" ;;
        sdk) echo "$locks/device.txt" ;;
        *) die "there is no $1 to install: it is authority, core, edge, device or sdk" ;;
    esac
}

# JetPack 6 is L4T 36, JetPack 7 is L4T 38 and above.
check_release() {
    [[ -r $release ]] || return 0
    local number
    number=$(sed -n 's/^# R\([0-9]*\).*/\1/p' "$release")
    [[ ${number:-0} -ge 36 ]] || die "this Jetson has L4T ${number:-of an unknown number}: JetPack 6 (L4T 36) or newer is needed"
    say "a Jetson with L4T $number"
}

# This machine's own Python, if the locks are for it.
own_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

need_venv() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    [[ $EUID -eq 0 && -x $(command -v apt-get) ]] || die "$1 has no venv: install your system's package for it (python3-venv)"
    { apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends python3-venv; } >&2
}

pip_install() {
    local pip=$1
    shift
    "$pip" install --quiet --disable-pip-version-check --no-input --only-binary :all: "$@"
}

# JetPack 6 has Python 3.10, for which there is no ONNX Runtime that is new enough: uv brings another.
bring_python() {
    local uv=$prefix/uv/bin/uv
    export UV_PYTHON_INSTALL_DIR=$prefix/python UV_NO_CONFIG=1
    need_venv python3
    python3 -m venv "$prefix/uv"
    pip_install "$prefix/uv/bin/pip" --require-hashes --requirement "$locks/uv.txt"
    "$uv" python install --no-bin "$brought" >&2 ||
        die "uv could not bring Python $brought: it comes from github.com, or from where UV_PYTHON_INSTALL_MIRROR says"
    "$uv" python find --managed-python "$brought"
}

# Does this Python have an ONNX Runtime for the GPU, of the version that the shards are for? PyPI has none for
# aarch64: it comes with JetPack or from NVIDIA, and is then to be seen from the virtual environment.
has_gpu_runtime() {
    ORT_DISABLE_TELEMETRY=1 "$1" - "$(sed -n 's/^onnxruntime==\([0-9]*\.[0-9]*\)\..*/\1/p' "$locks/edge.txt")" <<'PYTHON' 2>/dev/null
import sys
import onnxruntime

gpu = {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(onnxruntime.get_available_providers())
sys.exit(not (gpu and onnxruntime.__version__.startswith(f"{sys.argv[1]}.")))
PYTHON
}

install_program() {
    local python lock
    local seen=() sees=()
    if python=$(own_python); then
        need_venv "$python"
    else
        say "its own Python is not 3.11 to 3.13: Python $brought is brought by uv"
        python=$(bring_python)
    fi
    if has_gpu_runtime "$python"; then
        say "the ONNX Runtime for the GPU that $python has is used"
        sees=(--system-site-packages)
    fi
    "$python" -m venv "${sees[@]}" "$prefix"
    for kind in "${what[@]}"; do
        lock=$(lock_of "$kind")
        [[ " ${seen[*]} " == *" $lock "* ]] && continue
        seen+=("$lock")
        say "installing what $(basename "$lock" .txt) needs, each file checked against its hash"
        if [[ ${#sees[@]} -gt 0 ]]; then
            pip_install "$prefix/bin/pip" --require-hashes --requirement <(without_runtime "$lock")
        else
            pip_install "$prefix/bin/pip" --require-hashes --requirement "$lock"
        fi
    done
    pip_install "$prefix/bin/pip" --no-deps --force-reinstall "$wheel"
}

without_runtime() {
    awk '/^onnxruntime==/ { skip = 1 } !skip { print } !/\\$/ { skip = 0 }' "$1"
}

install_services() {
    getent passwd trifold >/dev/null ||
        useradd --system --home-dir "$state" --no-create-home --shell /usr/sbin/nologin trifold
    install -d -m 0755 "$state"
    install -d -m 0750 -o root -g trifold "$(dirname "$settings")"
    [[ -e $settings ]] || install -m 0640 -o root -g trifold "$here/../systemd/trifold.toml" "$settings"
    install -d -m 0755 "$units/trifold-.service.d"
    install -m 0644 "$here/../systemd/trifold-.service.d/hardened.conf" "$units/trifold-.service.d/"
    install -m 0644 "$here"/../systemd/trifold-renew@.* "$units/"
    for kind in "${what[@]}"; do
        install -d -m 0700 -o trifold -g trifold "$state/$kind"
        [[ $kind = sdk ]] && continue
        install -m 0644 "$here/../systemd/trifold-$kind.service" "$units/"
        install -D -m 0644 "$here/../systemd/serving.conf" "$units/trifold-$kind.service.d/serving.conf"
    done
    systemctl daemon-reload
    for kind in "${what[@]}"; do
        [[ $kind = sdk ]] || systemctl try-restart "trifold-$kind.service"
    done
}

while [[ $# -gt 0 ]]; do
    case $1 in
        --wheel) wheel=${2:?"--wheel wants a file"}; shift ;;
        --prefix) prefix=${2:?"--prefix wants a folder"}; shift ;;
        --only-program) services= ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit ;;
        -*) die "there is no option $1: see --help" ;;
        *) lock_of "$1" >/dev/null; what+=("$1") ;;
    esac
    shift
done
[[ ${#what[@]} -gt 0 ]] || die "say what to install: authority, core, edge, device or sdk"
[[ -z $services || $prefix = /opt/trifold ]] || die "services run what lies in /opt/trifold: --prefix is for --only-program"
if [[ -z $wheel ]]; then
    found=("$here"/../../dist/trifold-*.whl)
    wheel=${found[-1]}
fi
[[ -r $wheel ]] || die "there is no wheel $wheel: make one (\`make wheel\`), or name it with --wheel"
[[ -z $services || $EUID -eq 0 ]] || die "services are installed by root: use sudo, or --only-program with a --prefix of yours"

check_release
install_program
"$prefix/bin/trifold" version >&2
if [[ -n $services ]]; then
    install_services
    say "next: enrol this node, put its part of the bundle into $state, look through $settings (docs/deploy.md)"
fi
