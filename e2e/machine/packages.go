package machine

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Unpack downloads packages of a newer Debian than this machine may have, unless an earlier run did, and returns
// the directory that they are unpacked in. They are not installed.
func Unpack(suite string, names ...string) (dir string, _ error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	hash := sha256.Sum256([]byte(strings.Join(names, " ")))
	if dir = filepath.Join(cache, fmt.Sprintf("%s-%s-%x", names[0], suite, hash[:4])); Exists(dir) {
		return dir, nil
	}
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if err := Install([]Need{{"Debian's keyring", "debian-archive-keyring", Exists(keyring)}}); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp("", Prefix+names[0]+"-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	script := []string{"sh", "-euc", `
		cd "$1"; keyring=$2; suite=$3; dir=$4; shift 4
		mirror() { apt-get indextargets --format '$(LABEL) $(REPO_URI)' | awk '$1 == "Debian" { print $2; exit }'; }
		[ "$(mirror)" ] || apt-get -q update
		mkdir -p lists/partial archives/partial
		echo "deb [signed-by=$keyring] $(mirror) $suite main" >sources.list
		apt() {
			apt-get -q -o Dir::Etc::sourcelist="$PWD/sources.list" -o Dir::Etc::sourceparts=- \
				-o Dir::State::Lists="$PWD/lists" -o Dir::Cache="$PWD" -o APT::Sandbox::User=root "$@"
		}
		apt update
		apt download "$@"
		for package in ./*.deb; do
			dpkg-deb --extract "$package" unpacked
		done
		mv unpacked "$dir"`, "sh", work, keyring, suite, dir}
	return dir, Run(append(script, names...)...)
}
