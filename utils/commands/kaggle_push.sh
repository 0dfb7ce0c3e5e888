#!/usr/bin/env bash
# Upload the code, then push kernel after kernel, each waited for; at the end fetch the results.
# Started again, it goes on where it stopped.
#
#   ./push.sh           one kernel per notebook
#   ./push.sh series    one kernel for all, pushed again until it has finished
#
# The client says many failures in words and exits with 0, so its words are read.
set -euo pipefail
cd "$(dirname "$0")"
poll=${POLL_SECONDS:-30}   # between two looks at Kaggle
mkdir -p state results

say() { printf '%s  %s\n' "$(date +%H:%M)" "$*"; }
stop() { say "Stopped: $*" >&2; say "Once it is mended, start this again: it goes on here." >&2; exit 1; }
id_of() { sed -n 's/^ *"id": "\(.*\)",*$/\1/p' "$1"/*-metadata.json; }

number_of() {
  local number
  number=$(sed -n 's/.*"current_version_number": *\([0-9][0-9]*\).*/\1/p' <<<"$1")
  echo "${number:-0}"
}

upload_code() {
  [ ! -e state/code ] || { say "code: uploaded before"; return; }
  local id out before=0
  id=$(id_of code)
  # Folders are zipped, which Kaggle unpacks: by default the client would leave them out.
  if out=$(kaggle datasets status "$id" --format json 2>&1); then
    before=$(number_of "$out")
    out=$(kaggle datasets version -p code -r zip -m "push.sh $(date +%F)" 2>&1) || stop "$out"
  elif grep -qE '\b40[34]\b' <<<"$out"; then
    out=$(kaggle datasets create -p code -r zip 2>&1) || stop "$out"
  else
    stop "the code dataset's state is not to be had (kaggle 2.2 or newer, with a token?): $out"
  fi
  grep -q "is being created" <<<"$out" || stop "$out"
  say "code: uploaded to kaggle.com/datasets/$id, waiting until it is ready"
  local tries
  for ((tries = 0; tries < 120; tries++)); do
    sleep "$poll"
    out=$(kaggle datasets status "$id" --format json 2>&1) || continue
    if grep -q '"ready"' <<<"$out" && [ "$(number_of "$out")" -gt "$before" ]; then
      touch state/code
      return
    fi
    ! grep -qE '"(failed|error)"' <<<"$out" || stop "Kaggle could not make the code dataset: $out"
  done
  stop "the code dataset is not ready: $out"
}

push() {  # FOLDER: push it and note its version in state/FOLDER; else `words` says what is wrong
  local version
  words=$(kaggle kernels push -p "$1" 2>&1) || return 1
  version=$(sed -n 's/.*Kernel version \([0-9][0-9]*\) successfully pushed.*/\1/p' <<<"$words")
  [ -n "$version" ] || return 1
  # A refused attachment is said and the kernel runs all the same, without what it needs.
  ! grep -qE 'not valid .*sources|does not resolve' <<<"$words" || return 1
  echo "pushed $version" >"state/$1"
  say "$1: version $version of kaggle.com/code/$(id_of "$1")"
}

wait_for() {  # FOLDER: 0 when its pushed version is COMPLETE; else `words` says what is wrong
  local out id version status seen=no same=0 errors=0
  id=$(id_of "$1")
  version=$(cut -d' ' -f2 "state/$1")
  while :; do
    sleep "$poll"
    if ! out=$(kaggle kernels status "$id/$version" 2>&1); then
      errors=$((errors + 1))
      [ "$errors" -lt 10 ] || stop "$1: no answer on its status: $out"
      continue
    fi
    errors=0
    # Written 'complete' by older clients, 'KernelWorkerStatus.COMPLETE' by newer ones.
    status=$(sed -n 's/.* has status "\(.*\)".*/\1/p' <<<"$out" | sed 's/.*\.//' | tr a-z A-Z)
    case $status in
      QUEUED | RUNNING | NEW_SCRIPT | CANCEL_REQUESTED) seen=yes ;;
      COMPLETE | ERROR | CANCEL_ACKNOWLEDGED)
        # The client forgets the version that it is asked for: right after a push the answer may
        # still be the version before's. It counts once this one was seen to run, or said thrice.
        same=$((same + 1))
        if [ "$seen" = yes ] || [ "$same" -ge 3 ]; then
          words=$out
          [ "$status" = COMPLETE ]
          return
        fi ;;
      *) stop "$1: unknown status: $out" ;;
    esac
  done
}

run_kernel() {  # FOLDER: push it unless that was done, wait, stop on anything but COMPLETE
  case $(cat "state/$1" 2>/dev/null || true) in
    complete*) say "$1: complete before"; return ;;
    pushed*) say "$1: pushed before, waiting" ;;
    *) push "$1" || stop "$1: $words" ;;
  esac
  if ! wait_for "$1"; then
    rm "state/$1"
    stop "$words, see kaggle.com/code/$(id_of "$1")"
  fi
  echo complete >"state/$1"
  say "$1: COMPLETE"
}

fetch() {  # KERNEL-ID TARGET PATTERN: every page of a kernel's output
  local out token=
  while :; do
    out=$(kaggle kernels output "$1" -p "$2" --file-pattern "$3" --page-size 200 \
      ${token:+--page-token "$token"} 2>&1) || stop "results of $1: $out"
    token=$(sed -n 's/^Next page token: *//p' <<<"$out")
    [ -n "$token" ] || return 0
  done
}

# What the page of a run links to; not the phantoms, nor the models of the phases before the last.
results='(^|/)(report|student|notebooks)/|/(data|phase_[123])/[^/]*\.(png|csv|json)$|/phase_3/teacher\.keras$|index\.html$'

series() {
  local round=1 folder=series again=series_again
  [ ! -e state/round ] || read -r round folder again <state/round
  while :; do
    if [ "$folder" = series_again ]; then
      # Kaggle may refuse to attach a kernel to itself; the script then ends at once.
      if { [ -e "state/$folder" ] || push "$folder"; } && wait_for "$folder"; then
        say "session $round: COMPLETE"
      else
        say "the kernel does not go on by itself: it and a twin take turns"
        rm -f "state/$folder"
        folder=series_b again=twin
        echo "$round $folder $again" >state/round
        continue
      fi
    else
      run_kernel "$folder"
    fi
    rm -f results/FINISHED results/UNFINISHED
    fetch "$(id_of "$folder")" results '^(UN)?FINISHED$'
    if [ -e results/FINISHED ]; then
      fetch "$(id_of "$folder")" results "$results"
      return
    fi
    [ -e results/UNFINISHED ] || stop "$folder left no word on how far it came"
    rm -f "state/$folder"
    round=$((round + 1))
    [ "$round" -le 6 ] || stop "six sessions did not finish it: look at what takes so long"
    case $again-$folder in
      series_again-*) folder=series_again ;;
      twin-series_b) folder=series_a ;;
      *) folder=series_b ;;
    esac
    echo "$round $folder $again" >state/round
    say "session $round goes on"
  done
}

upload_code
[ ! -d 00_weights ] || run_kernel 00_weights
if [ "${1:-}" = series ]; then
  series
else
  for folder in 0[1-9]_*; do run_kernel "$folder"; done
  fetch "$(id_of "$folder")" results "$results"
fi
say "Done: see $PWD/results"
