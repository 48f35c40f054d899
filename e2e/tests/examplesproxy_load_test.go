package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectors-csi/e2e/machine"
	"connectors-csi/e2e/node"
)

// changesUnderLoad replaces the Secret, moves the target to another address, and rolls out another target, while new
// requests come all the time and a transfer runs. None may fail.
func (p standardProxy) changesUnderLoad() {
	var mu sync.Mutex
	seen := map[string]bool{} // credentials, addresses and names under which the target was asked
	p.target.handle("/load/", func(w http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		mu.Lock()
		seen[password], seen[r.Context().Value(http.LocalAddrContextKey).(net.Addr).String()], seen[r.Host] = true, true,
			true
		mu.Unlock()
		fmt.Fprint(w, "ok")
	})
	proceed := make(chan bool)
	p.target.handle("/slow/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "be")
		w.(http.Flusher).Flush()
		<-proceed
		fmt.Fprint(w, "gin and end")
	})
	wait := func(what string) {
		p.Helper()
		began := time.Now()
		p.eventually(func() error {
			mu.Lock()
			defer mu.Unlock()
			if !seen[what] {
				return fmt.Errorf("the target has not been asked with %s", what)
			}
			return nil
		})
		p.Logf("%s after %v", what, time.Since(began).Round(100*time.Millisecond))
	}

	authorization := "Bearer " + p.token("git-user")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	get := func(path string) (*http.Response, error) {
		request, err := http.NewRequest("GET", "http://"+p.host("git")+path+"/x.git/info/refs?service=git-upload-pack", nil)
		if err != nil {
			return nil, err
		}
		request.Header.Set("Authorization", authorization)
		return client.Do(request)
	}
	slow := func(client *http.Client) (*http.Response, error) {
		request, err := http.NewRequest("GET", "http://"+p.host("git")+"/slow/x.git/info/refs?service=git-upload-pack", nil)
		if err != nil {
			return nil, err
		}
		request.Header.Set("Authorization", authorization)
		return client.Do(request)
	}
	running, err := slow(http.DefaultClient)
	if err != nil {
		p.Fatal(err)
	}
	defer running.Body.Close()
	stop := make(chan bool)
	var requests, failures atomic.Int64
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond):
				}
				requests.Add(1)
				response, err := get("/load")
				if err == nil && response.StatusCode != 200 {
					err = errors.New(response.Status)
				}
				if err != nil {
					failures.Add(1)
					p.Errorf("a request: %v", err)
					continue
				}
				response.Body.Close()
			}
		})
	}
	p.kubectl("patch", "secret", "connectors-proxy-git", "--patch", `{"stringData": {"password": "changed"}}`)
	wait("changed")
	if err := theNode.LeadTo("git.example.com", node.MovedIP); err != nil {
		p.Fatal(err)
	}
	wait(node.MovedIP + ":443")
	if err := theNode.LeadTo("", ""); err != nil {
		p.Fatal(err)
	}
	theNode.Targets.Serve("git2.example.com", p.target)
	dir := p.copyExample("more")
	kustomization := readFile(p.T, dir+"/kustomization.yaml")
	writeFile(p.T, dir+"/kustomization.yaml", strings.Replace(kustomization, "git.example.com", "git2.example.com", 1))
	p.kubectl("apply", "-k", dir) // with the Secret of before
	wait("git2.example.com")
	p.rolledOut()
	time.Sleep(12 * time.Second) // the old Pods know since ten seconds that they are to end
	close(stop)
	all.Wait()
	p.Logf("%d requests, %d failures", requests.Load(), failures.Load())
	close(proceed)
	var body bytes.Buffer
	if _, err := body.ReadFrom(running.Body); err != nil || body.String() != "begin and end" {
		p.Errorf("the transfer that ran: %v: %q", err, body.String())
	}
	if address := p.kubectl("get", "connector", "git",
		"--output=jsonpath={.spec.address}"); address != "https://git2.example.com" {
		p.Errorf("the Connector's address is %s", address)
	}
}

// atOnce runs a script so many times at once, in directories of their own, and returns how long all took together.
func (p standardProxy) atOnce(times int, script string, env ...string) time.Duration {
	p.Helper()
	dir, err := os.MkdirTemp("/run", "load-")
	if err != nil {
		p.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var all sync.WaitGroup
	began := time.Now()
	for i := range times {
		all.Go(func() {
			cmd := exec.Command("timeout", "60", "sh", "-euc", script)
			cmd.Dir = filepath.Join(dir, fmt.Sprint(i))
			cmd.Env = append(append(os.Environ(), "HOME="+cmd.Dir, "CA="+theNode.Path(node.TargetCA)), env...)
			if err := os.Mkdir(cmd.Dir, 0o755); err != nil {
				p.Error(err)
				return
			}
			if output, err := cmd.CombinedOutput(); err != nil {
				p.Errorf("%v: %s", err, output)
			}
		})
	}
	all.Wait()
	return time.Since(began)
}

// carriesClones compares 50 clones at once, of 20 MB each, with the same without the proxy.
func (p standardProxy) carriesClones() {
	dir, err := os.MkdirTemp("/run", "big-")
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { os.RemoveAll(dir) })
	backend, err := node.GitBackend(dir)
	if err != nil {
		p.Fatal(err)
	}
	if err := machine.Run("sh", "-euc", `
		cd "$0/work"
		dd if=/dev/urandom of=big bs=1M count=20 status=none
		git add big
		git -c core.compression=0 -c user.name=test -c user.email=test@example.com commit -q -m big
		git push -q ../repositories/team/app.git main
		git -C ../repositories/team/app.git repack -adbq`, dir); err != nil {
		p.Fatal(err)
	}
	p.target.handle("/big/", node.WithPassword("bot", "change-me", http.StripPrefix("/big", backend)).ServeHTTP)
	direct := p.atOnce(50,
		`GIT_SSL_CAINFO="$CA" git -c http.extraHeader="$HEADER" clone --quiet --bare https://git.example.com/big/team/app.git`,
		"HEADER="+basic("bot", "change-me"))
	before := p.asked()
	proxied := p.atOnce(50, `git -c http.extraHeader="$HEADER" clone --quiet --bare "http://$NAME/big/team/app.git"`,
		"HEADER="+bearer(p.token("git-user")), "NAME="+p.host("git"))
	asked := p.asked().since(before)
	p.Logf("50 clones of 20 MB at once: %v without the proxy, %v with it, %.2f times as long; %d requests to the API server",
		direct.Round(time.Millisecond), proxied.Round(time.Millisecond), proxied.Seconds()/direct.Seconds(),
		asked.connectors)
	if proxied > 3*direct+time.Second {
		p.Errorf("with the proxy it takes more than three times as long")
	}
	if most := 2*(1+int(proxied/(10*time.Second))) +
		2; asked.connectors > most { // each Pod once in ten seconds, and the driver
		p.Errorf("the API server got %d requests, not %d at most", asked.connectors, most)
	}
}

// carriesPackages compares an npm install of a hundred packages with the same without the proxy.
func (p standardProxy) carriesPackages() {
	const packages = 100
	files := map[string]string{}
	dependencies := map[string]string{}
	for i := range packages {
		name := fmt.Sprintf("package-%d", i)
		addNPMPackage(p.T, files, name, strings.Repeat("module.exports = 1\n", 5000))
		dependencies[name] = "1.0.0"
	}
	manifest, err := json.Marshal(map[string]any{"name": "load", "version": "1.0.0", "dependencies": dependencies})
	if err != nil {
		p.Fatal(err)
	}
	theNode.Targets.Serve("npm.example.com", withToken("change-me", serve(files)))
	const install = `printf '%s' "$MANIFEST" >package.json; printf '%b' "$CONFIG" >.npmrc
		npm install --silent --no-audit --no-fund --cache cache >log 2>&1 || { cat log; exit 1; }
		test "$(ls node_modules | wc -l)" = 100`
	direct := p.atOnce(1, install, "MANIFEST="+string(manifest),
		`CONFIG=registry=https://npm.example.com/\n//npm.example.com/:_authToken=change-me\ncafile=`+theNode.Path(node.TargetCA)+`\n`)
	before := p.asked()
	proxied := p.atOnce(1, install, "MANIFEST="+string(manifest), fmt.Sprintf(
		`CONFIG=registry=http://%[1]s/\n//%[1]s/:_authToken=%[2]s\nreplace-registry-host=always\n`, p.host("npm"),
		p.token("npm-user")))
	asked := p.asked().since(before)
	p.Logf("npm install of %d packages: %v without the proxy, %v with it, %.2f times as long; %d requests to the API server",
		packages, direct.Round(time.Millisecond), proxied.Round(time.Millisecond), proxied.Seconds()/direct.Seconds(),
		asked.connectors)
	if proxied > 3*direct+time.Second {
		p.Errorf("with the proxy it takes more than three times as long")
	}
	if most := 2*(1+int(proxied/(10*time.Second))) + 2; asked.connectors > most {
		p.Errorf("the API server got %d requests, not %d at most", asked.connectors, most)
	}
}

// withToken serves to those who know the token.
func withToken(token string, handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+token {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	})
}
