#!/usr/bin/env bash
# Install, on Debian and Ubuntu, what the tests want and pip does not bring: a browser with its driver, and Prometheus.
# What is there already stays; on another system this says what is missing.
set -euo pipefail

packages=()
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null ||
  packages+=(chromium)
command -v chromedriver >/dev/null || packages+=(chromium-driver)
command -v promtool >/dev/null || packages+=(prometheus)
[ ${#packages[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "The tests want the programs of these Debian packages: ${packages[*]}" >&2
  exit 1
fi
root=()
[ "$(id -u)" = 0 ] || root=(sudo)
"${root[@]}" apt-get update -qq
"${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
