package examples

import (
	"encoding/json"
	"os"
	"reflect"
	"testing"

	"sigs.k8s.io/yaml"
)

// examples/git.json, which README.md's first command reads, is a list of the class and the Connector in examples/git.
func TestJSONIsTheYAML(t *testing.T) {
	var list struct {
		APIVersion, Kind string
		Items            []any
	}
	text, err := os.ReadFile("../../examples/git.json")
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	if err != nil || list.APIVersion != "v1" || list.Kind != "List" {
		t.Fatalf("%v: a %s of %s", err, list.Kind, list.APIVersion)
	}
	var want []any
	for _, name := range []string{"class", "connector"} {
		text, err := os.ReadFile("../../examples/git/" + name + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		var object any
		if err := yaml.Unmarshal(text, &object); err != nil {
			t.Fatal(err)
		}
		want = append(want, object)
	}
	if !reflect.DeepEqual(list.Items, want) {
		t.Errorf("examples/git.json has\n%v\nand examples/git\n%v", list.Items, want)
	}
}
