# Sourced by demo.sh and tests/run.sh: enters .venv, or stays in the virtual environment that is active, and installs
# what is missing. Does nothing the second time.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, python3 is $(python3 -V)" >&2; exit 1; }
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/installed-$(cat requirements.txt requirements-cpu.txt tests/requirements.txt | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Installing into $VIRTUAL_ENV (a few minutes, 4 GB)"
    index=$(grep -o 'https://[^ ]*' requirements-cpu.txt)
    extra=()
    if python -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        extra=(--extra-index-url "$index")
    fi # elsewhere plain pip is tried: a mirror may have what is needed
    pip install --quiet --disable-pip-version-check "${extra[@]}" -r requirements-cpu.txt -r tests/requirements.txt
    touch "$stamp"
fi
export OMP_NUM_THREADS=1 # per rank; before Python starts, since vLLM pins its threads
