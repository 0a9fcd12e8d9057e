#!/usr/bin/env bash
# Compile the kernels for ARM64, and test them in PyTorch's build for ARM64 under QEMU, which emulates the processor.
#
#   tests/arm/run.sh [FOLDER]
#
# FOLDER gets what is downloaded: 0.9 GB, by default in ~/.cache/improved_diffusion_arm. It needs Linux on x86-64, such
# as Debian 12, with:  apt install gcc-aarch64-linux-gnu qemu-user-static
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/improved_diffusion_arm}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
system=$folder/system packages=$folder/packages
# The newest on the package index whose build for ARM64 is one for CPUs.
torch=2.10.0

if [ ! -e "$folder/downloaded" ]; then
    # Debian's Python for ARM64 and the libraries that it needs, in a folder of their own. apt knows this machine's
    # sources; everything else that it keeps, it keeps in that folder.
    mkdir -p "$folder"/apt/{lists,archives}/partial "$system"
    : >"$folder/apt/status"
    apt_get() {
        apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User= -o Debug::NoLocking=1 \
            -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" "$@"
    }
    apt_get update
    apt_get install --yes --download-only --no-install-recommends python3 libgomp1 libstdc++6
    for package in "$folder"/apt/archives/*.deb; do dpkg-deb --extract "$package" "$system"; done

    # pip reads the markers of requirements ("only on x86_64") for this machine, so the packages are listed here.
    python_version=$(basename "$(readlink "$system/usr/bin/python3")" | sed 's/python//')
    python3 -m pip install --quiet --no-deps --upgrade --target "$packages" --only-binary=:all: \
        --python-version "$python_version" --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
        "torch==$torch" numpy pillow blobfile lxml pycryptodomex urllib3 filelock mpi4py platformdirs tqdm openpyxl \
        et_xmlfile typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec pytest iniconfig packaging pluggy \
        pygments scipy
    touch "$folder/downloaded"
fi

# A copy of the code, with the kernels for ARM64.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root"/{improved_diffusion,scripts,tests,pyproject.toml} "$work"
rm -f "$work"/improved_diffusion/kernels/compiled*
kernels=$work/improved_diffusion/kernels
sources=$(cd "$kernels" && cat $(ls *.c *.h | LC_ALL=C sort) | sha256sum | cut -d ' ' -f 1)
aarch64-linux-gnu-gcc -O3 -std=gnu11 -fopenmp -Wno-psabi -Wall -Werror -shared -fPIC "-DSOURCES=\"$sources\"" \
    "$kernels/kernels.c" -lm -o "$kernels/compiled.abi3.so"

# Commands that run Python on an emulated processor. They are also sys.executable, which the tests start.
for processor in max,sve=off cortex-a76; do
    cat >"$work/$processor" <<END
#!/bin/sh
PYTHONPATH=$work:$packages exec qemu-aarch64-static -cpu $processor -L $system $system/usr/bin/python3 "\$@"
END
    chmod +x "$work/$processor"
done

cd "$work"
export OMP_NUM_THREADS=1
# With instructions for bfloat16, as of Graviton3, and without, as a Raspberry Pi 5.
for processor in max,sve=off cortex-a76; do
    for program in tests/arm/{kernel_tests,train}.py; do
        echo "== $program on $processor"
        "./$processor" "$program" "$work/$processor"
    done
done
