#!/usr/bin/env bash
# Install what the C++ runtime, its service and its tests are built with, on Debian 12 or later: run as root.
#   runtime/cpp/install-packages.sh
# ONNX Runtime's headers, which Debian 12 lacks, are taken from Debian 13's package and unpacked into
# build/onnxruntime; the system's list of sources stays as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
packages=(g++ make cmake ninja-build pkg-config nlohmann-json3-dev libpcre2-dev libicu-dev libssl-dev doctest-dev
  libcpp-httplib-dev prometheus-cpp-dev clang-tidy)
missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

headers=build/onnxruntime
[[ -e $headers/usr/include/onnxruntime/onnxruntime_c_api.h ]] && exit 0
mkdir -p build
work=$(mktemp -d -p build)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,parts}
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u | head -1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] ${mirror:?no Debian mirror in the list of sources: run apt-get update} trixie main" >"$work/sources.list"
options=(-o "Dir::Etc::SourceList=$PWD/$work/sources.list" -o "Dir::Etc::SourceParts=$PWD/$work/parts"
  -o "Dir::State::Lists=$PWD/$work/lists" -o "Dir::Cache=$PWD/$work/cache" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update -qq
(cd "$work" && apt-get "${options[@]}" download -qq libonnxruntime-dev)
dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$work/unpacked"
mv "$work/unpacked" "$headers"
