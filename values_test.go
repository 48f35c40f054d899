package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
)

// What a Connector's author can write into other people's files, and what is said of values that do not fit.

// addressPatterns returns the patterns that deploy.yaml has the API server hold addresses against.
func addressPatterns(t *testing.T) []*regexp.Regexp {
	t.Helper()
	text, err := os.ReadFile("deploy.yaml")
	must(t, err)
	var patterns []*regexp.Regexp
	for _, match := range regexp.MustCompile(`(?m)^ +pattern: '(.*)'$`).FindAllStringSubmatch(string(text), -1) {
		patterns = append(patterns, regexp.MustCompile(strings.ReplaceAll(match[1], "''", "'"))) // as the API server does
	}
	if len(patterns) != 6 { // spec.address, spec.addressExtensions, and two in each status
		t.Fatalf("deploy.yaml has %d patterns", len(patterns))
	}
	return patterns
}

// The API server refuses what the driver refuses, of all characters that there are.
func TestPatternsOfAddressesAreTheDrivers(t *testing.T) {
	patterns := map[string]*regexp.Regexp{}
	for _, pattern := range addressPatterns(t) {
		patterns[pattern.String()] = pattern
	}
	const refused = "\"'`\\$<>{}|^" // of what is printed in ASCII
	for r := rune(0); r <= utf8.MaxRune; r++ {
		address := "a" + string(r) + "b" // of a surrogate U+FFFD, as a decoder of JSON makes of it
		want := r > ' ' && r < 0x7f && !strings.ContainsRune(refused, r)
		if got := checkAddress("", "", address) == nil; got != want {
			t.Errorf("%U: the driver says %v, not %v", r, got, want)
		}
		for _, pattern := range patterns {
			if got := pattern.MatchString(address); got != want {
				t.Errorf("%U: pattern %s says %v, not %v", r, pattern, got, want)
			}
		}
	}
	for _, address := range []string{"", "a", "\n", "a\n", "\na", "a\n\n", "a\nb", "\xff", "a\xe2\x80", "\ufeffa", "a\u0301"} {
		for _, pattern := range patterns {
			if driver, server := checkAddress("", "", address) == nil, pattern.MatchString(address); driver != server {
				t.Errorf("%q: the driver says %v, and pattern %s %v", address, driver, pattern, server)
			}
		}
	}
}

// Characters that start commands and variables, end elements, or cannot be told from others.
func TestCharactersOfAddresses(t *testing.T) {
	n := startNode(t)
	const rule = ", but an address is ASCII without white space, control characters, quotes and any of \\ ` $ < > { } | ^: "
	for part, message := range sorted(map[string]string{
		"$(id)":                         `'$' at position 11` + rule + `remove it, or write it as %24`,
		"${AWS_SECRET_ACCESS_KEY}":      `'$' at position 11` + rule + `remove it, or write it as %24`,
		"a{b":                           `'{' at position 12` + rule + `remove it, or write it as %7B`,
		"a}b":                           `'}' at position 12` + rule + `remove it, or write it as %7D`,
		"</url><id>x</id>":              `'<' at position 11` + rule + `remove it, or write it as %3C`,
		">/dev/null":                    `'>' at position 11` + rule + `remove it, or write it as %3E`,
		"|id":                           `'|' at position 11` + rule + `remove it, or write it as %7C`,
		"^":                             `'^' at position 11` + rule + `remove it, or write it as %5E`,
		"`id`":                          "'`' at position 11" + rule + `remove it, or write it as %60`,
		"%5C\\":                         `'\\' at position 14` + rule + `remove it, or write it as %5C`,
		"'":                             `'\'' at position 11` + rule + `remove it, or write it as %27`,
		" ":                             `' ' at position 11` + rule + `remove it, or write it as %20`,
		"\n":                            `'\n' at position 11` + rule + `remove it, or write it as %0A`,
		"\x7f":                          `'\x7f' at position 11` + rule + `remove it, or write it as %7F`,
		"\u200b":                        `U+200B at position 11` + rule + `remove it, or write it as %E2%80%8B, in a host name as xn--…`,
		"\u202e":                        `U+202E at position 11` + rule,
		"\u2066":                        `U+2066 at position 11` + rule,
		"\u3164":                        `U+3164 at position 11` + rule, // Hangul filler
		"\uffa0":                        `U+FFA0 at position 11` + rule,
		"\u00ad":                        `U+00AD at position 11` + rule,
		"\u0430pple":                    `U+0430 at position 11` + rule + `remove it, or write it as %D0%B0, in a host name as xn--…`, // Cyrillic
		"\u2024":                        `U+2024 at position 11` + rule,
		"\uff0f":                        `U+FF0F at position 11` + rule,
		"\ufe0f":                        `U+FE0F at position 11` + rule,
		"\U000e0041":                    `U+E0041 at position 11` + rule, // a tag
		"\ufeff":                        `U+FEFF at position 11` + rule,
		"例え":                            `U+4F8B at position 11` + rule,
		"\U0010ffff":                    `U+10FFFF at position 11` + rule,
		strings.Repeat("a", 5000) + "|": `'|' at position 5011` + rule,
	}) {
		n.api.put(connector("default", "git", "git", with("https://x/"+part, "spec", "address")))
		n.volume(attrs{"configuration.names": "first"}).mustRefuse(codes.FailedPrecondition, `Connector "default/git": spec.address holds `+message)
	}
	// What addresses have that exist: query strings, JDBC, IPv6, percent-encoding.
	for _, address := range []string{"jdbc:oracle:thin:@//db.example.com:1521/x", "jdbc:sqlserver://db;databaseName=a,b;user=(c)", "git@example.com:a/~b.git",
		"https://u:p@[fd00::1%25eth0]:8443/%7Bx%7D/?a=b&c=*!#d", "oci+ssh://host_1/a+b", "xn--r8jz45g.example.com"} {
		n.api.put(class("git", configuration("config", "file", "{{ .connector.spec.address }}")), connector("default", "git", "git", with(address, "spec", "address")))
		v := n.volume()
		v.mustPublish()
		v.want("file", address)
	}
}
