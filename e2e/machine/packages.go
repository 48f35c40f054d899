package machine

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Packages are some of Debian's.
type Packages struct {
	Suites  []string // of Debian, newer or older than this machine's
	Arch    string   // the processor, as Debian and Go name it
	Names   []string // extended regular expressions, each for the newest of the packages that it matches
	Without []string // patterns of tar's, of what is left out
}

// Unpack downloads the packages, unless an earlier run did, and returns the directory that they are unpacked in. They
// are not installed, and the machine's own lists of packages stay as they are.
func (p Packages) Unpack() (dir string, _ error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	hash := sha256.Sum256(fmt.Append(nil, p))
	if dir = filepath.Join(cache, fmt.Sprintf("packages-%s-%x", p.Suites[0], hash[:6])); Exists(dir) {
		return dir, nil
	}
	if !HasCommand("apt-get") || !HasCommand("dpkg-deb") {
		return "", errors.New("this machine lacks apt-get and dpkg-deb, which packages of Debian are fetched with")
	}
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if err := Install([]Need{{"Debian's keyring", "debian-archive-keyring", Exists(keyring)}}); err != nil {
		return "", err
	}
	unlock, err := Lock(filepath.Join(cache, "packages.lock"), "fetching packages")
	if err != nil {
		return "", err
	}
	defer unlock()
	if Exists(dir) {
		return dir, nil
	}
	work, err := os.MkdirTemp(cache, "packages-unfinished-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	script := []string{"sh", "-eufc", `
		cd "$1"; keyring=$2; dir=$3; suites=$4; arch=$5; names=$6; shift 6
		mirror() { apt-get indextargets --format '$(LABEL) $(REPO_URI)' | awk '$1 == "Debian" { print $2; exit }'; }
		[ "$(mirror)" ] || apt-get -q update
		mkdir -p lists/partial archives/partial unpacked
		for suite in $suites; do
			echo "deb [signed-by=$keyring] $(mirror) $suite main"
		done >sources.list
		apt() { # What is installed here, and for which processor, is nothing to it.
			command=$1; shift
			"$command" -q -o Dir::Etc::sourcelist="$PWD/sources.list" -o Dir::Etc::sourceparts=- \
				-o Dir::State::Lists="$PWD/lists" -o Dir::State::status=/dev/null -o Dir::Cache="$PWD" \
				-o APT::Sandbox::User=root -o APT::Architecture="$arch" -o APT::Architectures::="$arch" "$@"
		}
		apt apt-get update
		apt apt-cache pkgnames >names
		all=
		for name in $names; do
			newest=$(grep -Ex "$name" names | sort -V | tail -n 1)
			[ "$newest" ] || { echo "No package $name is, or is any more, in Debian's $suites."; exit 1; }
			all="$all $newest"
		done
		apt apt-get download $all
		set +f
		for package in ./*.deb; do
			dpkg-deb --fsys-tarfile "$package" | tar -x -C unpacked "$@"
		done
		mv unpacked "$dir"`, "sh", work, keyring, dir, strings.Join(p.Suites, " "), p.Arch, strings.Join(p.Names, " ")}
	for _, pattern := range p.Without {
		script = append(script, "--exclude="+pattern)
	}
	return dir, Run(script...)
}
