// Package cluster has what is said to the node's cluster, and what the driver leaves on the node, for the tests as for
// the commands.
package cluster

import (
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"time"
)

// Kubectl runs kubectl as the cluster's administrator and returns what it printed. The error ends with
// kubectl's own message.
func Kubectl(args ...string) (string, error) { return KubectlStdin("", args...) }

// KubectlStdin is kubectl with something to read.
func KubectlStdin(stdin string, args ...string) (string, error) {
	var stdout, stderr strings.Builder
	cmd := exec.Command("kubectl", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err,
			strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Await calls condition until it returns nil, and after limit returns its last error.
func Await(limit time.Duration, condition func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := condition()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %w", limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// HTTPGet returns the body of an answer that is a success. It does not wait long: a server may have gone without a
// word, as a Pod that is replaced does.
func HTTPGet(url string) (string, error) {
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, response.Status, body)
	}
	return string(body), err
}
