package main

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	os.Exit(onNode(func(*Node) int { return m.Run() }))
}

func TestNodeRunsPods(t *testing.T) {
	for _, args := range [][]string{
		{"run", "pod", "--image=" + gitImage, "--command", "--", "sleep", "1000000"},
		{"wait", "--for=condition=Ready", "pod/pod", "--timeout=60s"},
		{"exec", "pod", "--", "git", "--version"},
	} {
		if _, err := kubectl(args...); err != nil {
			t.Fatal(err)
		}
	}
}
